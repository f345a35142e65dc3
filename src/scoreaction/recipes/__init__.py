"""Recipes: reading, checking, building and restoring what a YAML file describes."""
