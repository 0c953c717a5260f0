"""Costs of models: parameters, multiply-adds, speed and memory."""
