"""Speed benchmarks; run as `python -m pipelines.benchmarks.<name>`. Importing this package imports nothing else."""

import os

# Read when torch loads. PyTorch's CPU threads spin while they wait for each other; where other processes want the cores
# too, that made the same calls four to six times as long (2 cores, load 4.5), and other ratios of them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
