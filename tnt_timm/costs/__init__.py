"""Parameters, multiply-adds and speed of models."""
