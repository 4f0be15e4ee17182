r"""A sample's token ids as text for people, in the smallest groups of tokens that are whole characters.

Comes in: ids of a row of the index. Goes out: `TokenGroup`s in order.

    TokenGroup("user", (872,))  TokenGroup("\n", (198,))  TokenGroup("<image>", (151646,), num_image_tokens=576)
    TokenGroup("é", (195, 169))          TokenGroup("red", (1151,), is_supervised=True)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
# A character has at most four bytes, and a token may hold the end of one and the beginning of the next. Beyond two
# characters the bytes are not going to become text.
_MOST_TOKENS_PER_GROUP = 8


@dataclass(frozen=True)
class TokenGroup:
    """One or a few tokens that are text together."""

    text: str
    ids: tuple[int, ...]
    is_supervised: bool = False
    is_special: bool = False  # such as `<|im_end|>`
    num_image_tokens: int = 0  # for a placeholder, the tokens that it stands for


class Reader:
    """Turns ids into groups, for one tokenizer.

    Args:
        tokenizer: the model's fast tokenizer.
        image_token_id: the placeholder's id.
        num_image_tokens: tokens per image.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, num_image_tokens: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._image_token_id, self._num_image_tokens = image_token_id, num_image_tokens

    def groups(self, ids: Sequence[int], supervised_spans: Sequence[int]) -> list[TokenGroup]:
        """Return a sample's groups.

        Args:
            ids: one placeholder per image.
            supervised_spans: flat [start, end, ...] over `ids`.
        """
        found: list[TokenGroup] = []
        borders = [0, *supervised_spans, len(ids)]
        for number, (start, end) in enumerate(pairwise(borders)):
            before = found[-1].ids if found else ()
            found += self._run(ids[start:end], is_supervised=number % 2 == 1, before=before)
        return found

    def _run(self, ids: Sequence[int], is_supervised: bool, before: tuple[int, ...]) -> Iterator[TokenGroup]:
        group: tuple[int, ...] = ()
        for number, token in enumerate(ids):
            group = (*group, token)
            following = ids[number + 1] if number + 1 < len(ids) else None
            text = self._text(before, group)
            breaks_off = following is None or following in self._special or token in self._special
            if text.endswith(_INCOMPLETE) and not breaks_off and len(group) < _MOST_TOKENS_PER_GROUP:
                continue
            num_image_tokens = self._num_image_tokens if token == self._image_token_id else 0
            yield TokenGroup(text, group, is_supervised, token in self._special, num_image_tokens)
            before, group = group, ()

    def _text(self, before: tuple[int, ...], group: tuple[int, ...]) -> str:
        """Return the text of a group, read after the tokens before it: some tokenizers strip the first space."""
        whole, prefix = self._decode([*before, *group]), self._decode(before)
        return whole[len(prefix) :] if whole.startswith(prefix) else self._decode(group)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))
