"""What stands behind the commands: settings, runs and their checkpoints, one-line errors."""
