"""What frozen features are worth: extraction, nearest neighbours, linear probes."""
