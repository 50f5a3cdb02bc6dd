"""In which order images come, and how they become batches."""
