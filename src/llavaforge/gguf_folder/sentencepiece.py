"""A SentencePiece vocabulary (Llama 2's, Vicuna's) for llama.cpp's own tokenizer of that kind.

Comes in: `tokenizer.json`, BPE with `byte_fallback`, which merges the neighbours whose pair stands first in its list.
Goes out: a score for each token; llama.cpp merges the neighbours whose result has the highest one, leftmost first.

    merges "▁ t", "▁t h", "▁th e"  ->  scores ▁t 0, ▁th -1, ▁the -2

Both do the same to every text, because what happens to a stretch of text until it is one token depends on that stretch
alone: a token alone as text ends in the merge that makes it everywhere. Its rank is the score. A pair that no merge
names, but whose result is a token, would be merged by llama.cpp alone: then that token as text ends as this pair.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import TokenType

from llavaforge.errors import UserError

_SPACE = "▁"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_SCHEMES = ("first", "always", "never")


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Say whether a `tokenizer.json` is BPE over characters, with bytes for those that it lacks."""
    return content["model"].get("type") == "BPE" and bool(content["model"].get("byte_fallback"))


def check_sentencepiece(content: dict[str, Any], path: Path) -> None:
    """Check that llama.cpp's tokenizer does the same as a folder's.

    Args:
        content: of `tokenizer.json`.
        path: of it, for messages.

    Raises:
        UserError: it does not, or this is not known.
    """
    model, scheme = content["model"], space_scheme(content, path)
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if unlike := [key for key in others if model.get(key)]:
        raise UserError(f"{path}: --format gguf: llama.cpp's SentencePiece has no {unlike[0]} ({model[unlike[0]]!r}).")
    if missing := sorted(_BYTES - set(model["vocab"])):
        raise UserError(
            f"{path}: --format gguf: the vocabulary has no token {missing[0]}; llama.cpp needs all 256 bytes."
        )
    added = [token["content"] for token in content.get("added_tokens", [])]
    for token in content.get("added_tokens", []):
        if token.get("normalized") and (scheme == "prepend" or " " in token["content"]):
            raise UserError(
                f"{path}: --format gguf: the token {token['content']!r} is `normalized`: it is looked for with the "
                f"{_SPACE} of the normalizer, by llama.cpp without it."
            )
        if scheme == "always" and any(token["content"] in one for one in added if one != token["content"]):
            raise UserError(
                f"{path}: --format gguf: the token {token['content']!r} is a part of another: where text begins with "
                f"{_SPACE} (prepend_scheme `always`) is not written for such."
            )
    scores(content, path)


def space_scheme(content: dict[str, Any], path: Path) -> str:
    """Return where a tokenizer puts a space of its own.

    Args:
        content: of `tokenizer.json`.
        path: of it, for messages.

    Returns:
        `prepend`: before the text and after each added token, as llama.cpp does; `always`: the same where there is no
        space already; `first`: before the text alone, where there is none; `never`.

    Raises:
        UserError: it is another way of treating spaces.
    """
    normalizer, pre_tokenizer = content.get("normalizer") or {}, content.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    if pre_tokenizer is None and steps == [_PREPEND, _REPLACE]:
        return "prepend"
    if pre_tokenizer is None and steps == [_REPLACE]:
        return "never"
    given = pre_tokenizer or {}
    if any(steps) or given.get("type") != "Metaspace" or given.get("replacement") != _SPACE:
        raise UserError(
            f"{path}: --format gguf: this SentencePiece vocabulary has the normalizer {normalizer} and the "
            f"pre_tokenizer {pre_tokenizer}. Known are Prepend and Replace, or Metaspace, with {_SPACE} alone."
        )
    if given.get("prepend_scheme") not in _SCHEMES:
        raise UserError(f"{path}: --format gguf: Metaspace's prepend_scheme is none of {', '.join(_SCHEMES)}.")
    inside = next((text for text in content["model"]["vocab"] if _SPACE in text[1:]), None)
    if given.get("split", True) and inside is not None:
        raise UserError(
            f"{path}: --format gguf: Metaspace splits the text at spaces, but the token {inside!r} has one inside, "
            "which llama.cpp would make."
        )
    return str(given["prepend_scheme"])


def scores(content: dict[str, Any], path: Path) -> dict[str, float]:
    """Return the score of every token that merges make: minus the rank of the last one.

    Args:
        content: of `tokenizer.json`.
        path: of it, for messages.

    Raises:
        UserError: llama.cpp would merge what the list of merges does not.
    """
    pairs = (one.split(" ") if isinstance(one, str) else one for one in content["model"]["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    added = {token["content"] for token in content.get("added_tokens", [])}
    found = {}
    for text in [*content["model"]["vocab"], *added]:
        symbols, rank = _merged(text, ranks)
        is_cut_before = text in added and _SPACE not in text
        if len(symbols) == 2 and not is_cut_before:
            raise UserError(
                f"{path}: --format gguf: the merges leave {text!r}, which is a token, as {symbols[0]!r} and "
                f"{symbols[1]!r}. llama.cpp would merge these. SentencePiece's own lists have every pair."
            )
        if len(symbols) == 1 and rank is not None:
            found[text] = -float(rank)
    return found


def _merged(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], int | None]:
    """Return what the merges make of a text, and the rank of the last one."""
    symbols, last = list(text), None
    while len(symbols) > 1:
        found = [ranks.get(pair, len(ranks)) for pair in pairwise(symbols)]
        if (best := min(found)) == len(ranks):
            break
        where, last = found.index(best), best
        symbols[where : where + 2] = ["".join(symbols[where : where + 2])]
    return symbols, last


def kind_of(text: str, content: dict[str, Any]) -> TokenType | None:
    """Return the kind of a token that only SentencePiece has, None for others."""
    if not is_sentencepiece(content):
        return None
    if text == content["model"].get("unk_token"):
        return TokenType.UNKNOWN
    return TokenType.BYTE if text in _BYTES else None
