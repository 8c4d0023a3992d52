"""The study room: planning, sweeps, fits, report."""
