"""The kinds of scorer a recipe can name: one file each, and one row each in ``kinds.py``."""
