"""Arguments that several verbs have."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--config FILE [key=value ...]`, the same for every verb that reads a configuration."""
    parser.add_argument("--config", metavar="FILE", required=required, help="YAML file (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
