"""Texts of other people's data made visible: what cannot be seen, or would command a terminal, becomes a sign."""

import unicodedata
from itertools import groupby
from typing import NamedTuple

# Joiners shape letters and emoji; without them a text is another one.
_JOINERS = "\u200c\u200d"


class Glyphs(NamedTuple):
    """A stretch of a text: a sign for something that cannot be seen, and text to write after it; either may be empty.

    The sign of a line break and of a tab comes with the character itself. Other invisible characters are left out of
    the text, since some act on what follows (they turn the reading direction, or command a terminal).
    """

    sign: str
    text: str


def glyphs(text: str) -> list[Glyphs]:
    """Split a text at the characters that cannot be seen."""
    found = []
    for sign, run in groupby(text, _sign):
        if sign is None:
            found.append(Glyphs("", "".join(run)))
        else:
            found += [Glyphs(sign, character if character in "\n\t" else "") for character in run]
    return found


def visible(text: str) -> str:
    """Return a text for a terminal: invisible characters as their numbers, line breaks and tabs as they are."""
    return "".join(part.text or f"<{part.sign}>" for part in glyphs(text))


def _sign(character: str) -> str | None:
    if character in "\n\t":
        return "\u23ce" if character == "\n" else "\u21e5"
    if character == " " or character in _JOINERS:
        return None
    # Categories: C, other (control, format, private, unassigned); Z, separators (no-break space, line separator).
    return f"U+{ord(character):04X}" if unicodedata.category(character)[0] in "CZ" else None
