"""Recipes: instances of the run configuration, as YAML."""
