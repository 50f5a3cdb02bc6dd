"""From bytes to batches: where images are, what an image is, in which order and how they come."""
