"""Everything that is drawn: curves, reconstructions, classes, segmentations, detections."""
