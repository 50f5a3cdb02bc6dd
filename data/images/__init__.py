"""What an image is: decoded, normalised, cropped and augmented."""
