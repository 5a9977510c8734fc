"""Recipes, data and the training loop."""
