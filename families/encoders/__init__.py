"""A page for each encoder: all that is known of it beyond its configuration and its modeling file, as `FAMILY`."""
