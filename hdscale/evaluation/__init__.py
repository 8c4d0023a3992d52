"""Evaluation by generation: decoding over ranks, prediction files, metrics and averages, the MRQA protocol."""
