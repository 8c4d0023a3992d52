"""The evaluation room: decoding, metrics, protocols, significance."""
