"""Evaluation of models: accuracy, prediction and results tables."""
