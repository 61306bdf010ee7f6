"""Draft networks for any Whisper, from speech alone; `training.train_draft` runs it whole."""
