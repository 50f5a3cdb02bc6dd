"""The encoders there are: what each is made of, from which checkpoints it starts, and how these are made to fit."""
