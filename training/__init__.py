"""Training itself: the pre-training loop, optimisation, the linear probe, and how processes agree."""
