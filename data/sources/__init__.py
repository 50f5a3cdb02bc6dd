"""Sources of images: folders, arrays, data sets, shards, and subsets of them."""
