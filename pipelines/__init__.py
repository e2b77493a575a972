"""Ray pipelines: prepare, train, evaluate, register, serve. Importing this package imports nothing else."""
