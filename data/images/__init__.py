"""Images: decoding, normalisation, crops and augmentation."""
