"""Loaders: samples in their order, made into batches."""
