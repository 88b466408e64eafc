"""Runnable recipes, one a data set: ``python -m recipes.digits``."""
