"""Recipes, data, and the loop."""
