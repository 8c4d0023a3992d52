"""hdscale: train hyperdecoders (instance-specific decoders for T5) at cluster scale."""

__version__ = "0.1.0"
