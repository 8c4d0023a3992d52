"""A real SLURM on one machine, for the tests."""
