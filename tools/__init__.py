"""What made the assets that the package carries: not installed."""
