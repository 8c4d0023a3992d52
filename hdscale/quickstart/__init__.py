"""The embedded default: a tiny T5, the language it was pre-trained on, and four generated tasks in it.

Nothing here needs a network: `model.name: quickstart` and `data.tasks: [quickstart]` run from the package
alone.
"""

from pathlib import Path


def asset_folder() -> Path:
    """Folder of the packaged base model: weights, configuration and tokenizer."""
    return Path(__file__).resolve().parent.parent / "assets" / "quickstart"
