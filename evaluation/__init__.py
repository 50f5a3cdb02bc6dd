"""What an encoder is worth: features, nearest neighbours, metrics, robustness."""
