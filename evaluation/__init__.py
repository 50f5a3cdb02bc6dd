"""Evaluation of encoders: features, nearest neighbours, metrics, robustness."""
