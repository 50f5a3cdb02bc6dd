"""The pre-training loop and what it stands on: schedule, parameter groups, checkpoints, monitors."""
