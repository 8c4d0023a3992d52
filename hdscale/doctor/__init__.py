"""What a machine can do."""
