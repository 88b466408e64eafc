"""Benchmarks of speed and memory, for example ``python -m recipes.benchmarks.training``."""
