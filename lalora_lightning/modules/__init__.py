"""LightningModules, one per domain. Import each from its own file, which loads the libraries of its domain."""
