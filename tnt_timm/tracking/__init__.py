"""Experiment trackers: Weights & Biases and TensorBoard. `trackers.py` opens those that the settings ask for."""
