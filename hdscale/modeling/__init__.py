"""The modeling room: what the paper defines."""
