"""What every example shares: configuration, run folder, checkpoints, progress, log and plots."""
