"""The embedded base: a tiny T5 that the package carries, so that `model.name: quickstart` needs no network."""

from pathlib import Path


def asset_folder() -> Path:
    """Folder of the packaged base model: weights, configuration and tokenizer."""
    return Path(__file__).resolve().parent.parent / "assets" / "quickstart"
