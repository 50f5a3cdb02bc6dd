"""Where images are: folders, arrays, data sets, shards, and parts of them."""
