"""Colours that colour-blind readers can tell apart (Okabe and Ito's, the dark ones first), each with a marker."""

from __future__ import annotations

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#555555"
"""Of lines that belong to no group."""
PALE = "#999999"
"""Of the remaining groups."""


def style(index: int) -> tuple[str, str]:
    """Colour and marker of group number `index`; after the last colour, the colours come again with other markers."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
