"""The user's half: modules, datamodules, hyperparameters and hooks."""
