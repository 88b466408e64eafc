"""LightningDataModules, one a domain. Import them from their files: each loads the libraries of its domain."""
