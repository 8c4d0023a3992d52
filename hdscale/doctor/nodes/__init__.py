"""`hdscale doctor --nodes`: what several nodes can do together."""
