"""transformers' Trainer with loaders of our own: classification, dense tasks, callbacks, averaged weights."""
