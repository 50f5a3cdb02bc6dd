"""Training of encoders and classifiers, and what it stands on: schedules, groups, checkpoints, monitors."""
