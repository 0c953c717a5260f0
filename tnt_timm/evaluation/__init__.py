"""Accuracy, prediction and tables of results."""
