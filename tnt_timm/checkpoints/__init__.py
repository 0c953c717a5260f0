"""Weights on disk: file format, run folder, saving, and the way from a file to a model."""
