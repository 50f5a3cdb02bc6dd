"""What a user can say: one file for each group of flags, how a flag is written down, and recipes."""
