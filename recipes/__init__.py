"""Runnable recipes, one per data set, for example ``python -m recipes.digits``."""
