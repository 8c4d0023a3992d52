"""The quick start's tasks: generated rows in a generated language."""
