"""From sound files to text: reading audio, translating speech of any length, measuring translations."""
