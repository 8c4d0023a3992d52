"""Plans of a run; studies of many runs: their file, their start, their state, fits and report."""
