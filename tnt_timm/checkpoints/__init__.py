"""Checkpoints: file format, run folder, saving and resuming, and models with the weights of a file."""
