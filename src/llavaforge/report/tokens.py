r"""A sample's token ids as text for people, in the smallest groups of tokens that are whole characters.

Comes in: ids of a row of the index. Goes out: `Piece`s in order.

    Piece(text="user", ids=(872,))  Piece("\n", (198,))  Piece("<image>", (151646,), num_image_tokens=576)
    Piece("é", (195, 169))          Piece("red", (1151,), is_supervised=True)
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
# A character has at most four bytes, and a token may hold the end of one and the beginning of the next. Beyond two
# characters the bytes are not going to become text.
_MOST_TOKENS_PER_GROUP = 8
# Joiners shape letters and emoji; without them a text is another one.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Piece:
    """One or a few tokens that are text together.

    Attributes:
        text: what they say.
        ids: the tokens.
        is_supervised: whether the loss sees them.
        is_special: a special token, such as `<|im_end|>`.
        num_image_tokens: for a placeholder, the tokens that it stands for; else 0.
    """

    text: str
    ids: tuple[int, ...]
    is_supervised: bool = False
    is_special: bool = False
    num_image_tokens: int = 0


class Glyphs(NamedTuple):
    """A stretch of a text: a sign for something that cannot be seen, and text to write after it; either may be empty.

    The sign of a line break and of a tab comes with the character itself. Other invisible characters are left out of
    the text, since some act on what follows (they turn the reading direction, or command a terminal).
    """

    sign: str
    text: str


class Reader:
    """Turns ids into pieces, for one tokenizer.

    Args:
        tokenizer: the model's fast tokenizer.
        image_token_id: the placeholder's id.
        num_image_tokens: tokens per image.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, num_image_tokens: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._image_token_id, self._num_image_tokens = image_token_id, num_image_tokens

    def pieces(self, ids: Sequence[int], supervised_spans: Sequence[int]) -> list[Piece]:
        """Return a sample's pieces.

        Args:
            ids: one placeholder per image.
            supervised_spans: flat [start, end, ...] over `ids`.
        """
        found: list[Piece] = []
        borders = [0, *supervised_spans, len(ids)]
        for number, (start, end) in enumerate(pairwise(borders)):
            before = found[-1].ids if found else ()
            found += self._run([int(i) for i in ids[start:end]], is_supervised=number % 2 == 1, before=before)
        return found

    def _run(self, ids: Sequence[int], is_supervised: bool, before: tuple[int, ...]) -> Iterator[Piece]:
        group: tuple[int, ...] = ()
        for number, token in enumerate(ids):
            group = (*group, token)
            following = ids[number + 1] if number + 1 < len(ids) else None
            text = self._text(before, group)
            breaks_off = following is None or following in self._special or token in self._special
            if text.endswith(_INCOMPLETE) and not breaks_off and len(group) < _MOST_TOKENS_PER_GROUP:
                continue
            is_image = token == self._image_token_id
            yield Piece(text, group, is_supervised, token in self._special, self._num_image_tokens if is_image else 0)
            before, group = group, ()

    def _text(self, before: tuple[int, ...], group: tuple[int, ...]) -> str:
        """Return the text of a group, read after the tokens before it: some tokenizers strip the first space."""
        whole, prefix = self._decode([*before, *group]), self._decode(before)
        return whole[len(prefix) :] if whole.startswith(prefix) else self._decode(group)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def glyphs(text: str) -> list[Glyphs]:
    """Split a text at the characters that cannot be seen."""
    found, begin = [], 0
    for place, character in enumerate(text):
        if (sign := _sign(character)) is None:
            continue
        if begin < place:
            found.append(Glyphs("", text[begin:place]))
        found.append(Glyphs(sign, character if character in "\n\t" else ""))
        begin = place + 1
    return [*found, Glyphs("", text[begin:])] if begin < len(text) else found


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
