"""From bytes to batches: sources of images, decoding and augmentation, the order of samples, loaders."""
