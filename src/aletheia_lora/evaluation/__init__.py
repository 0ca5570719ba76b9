"""Scores of a model and its adapters on standard tasks, kept item by item."""
