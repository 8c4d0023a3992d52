"""The operator room: batched adapter generation."""
