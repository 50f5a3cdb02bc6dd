"""Checkpoints: the store of whole ones, the state in them, and their files."""
