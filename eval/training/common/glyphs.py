"""A bitmap font of 18 glyphs that are hard to confuse, five by seven dots, drawn at twice that size in a square cell."""

from __future__ import annotations

import numpy as np

GLYPH_SIZE = 16
"""Side of a glyph's cell in pixels (two patches)."""

_DOTS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "7": "11111 00001 00010 00100 01000 01000 01000",
}


def _cell(rows: str) -> np.ndarray:
    dots = np.array([[dot == "1" for dot in row] for row in rows.split()])
    cell = np.zeros((GLYPH_SIZE, GLYPH_SIZE), bool)
    cell[1:15, 3:13] = dots.repeat(2, axis=0).repeat(2, axis=1)
    return cell


GLYPHS: dict[str, np.ndarray] = {name: _cell(rows) for name, rows in _DOTS.items()}
"""Boolean cell of every glyph, true where there is ink."""
