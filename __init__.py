"""MI-MAE: masked-image pre-training with mask-invariant mutual information."""
