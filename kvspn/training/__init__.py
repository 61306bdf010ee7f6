"""Training: the phrasebook corpus, synthetic speech, and the recipe that makes the miniature."""
