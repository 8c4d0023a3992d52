"""Frozen bases: the T5 family, its weights, and the hooks that an adaptation may use."""
