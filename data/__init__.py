"""Image sources, their order, decoding, augmentation and loaders."""
