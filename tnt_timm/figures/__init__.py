"""Figures of trained networks and measured costs."""
