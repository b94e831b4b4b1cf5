"""Recipes, training, the package format and release signing."""
