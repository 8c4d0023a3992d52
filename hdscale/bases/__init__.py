"""Frozen bases: T5's family, its weights, and the hooks of an adaptation."""
