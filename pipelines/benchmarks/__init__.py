"""Speed measurements. Those of the sampler and of a training step need `yan_core` alone."""
