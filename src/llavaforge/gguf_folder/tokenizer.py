"""The tokenizer of a model folder as fields of `model.gguf`.

Comes in: `tokenizer.json` and the processor. Goes out: vocabulary, merges, kinds of tokens, the name that llama.cpp has
for the way the text is cut before the merges (its pre-tokenizer), the ends of an answer, and no BOS: the chat template
writes it, in training as here. A SentencePiece vocabulary has scores in place of merges.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from llavaforge.errors import UserError
from llavaforge.gguf_folder.chat_template import Spaces
from llavaforge.gguf_folder.sentencepiece import (
    check_sentencepiece,
    is_sentencepiece,
    kind_of,
    scores,
    space_scheme,
)
from llavaforge.model_folder.json_files import read_json

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_PRE_TOKENIZERS = {"qwen2": [_QWEN2], "llama-bpe": [_LLAMA3], "gpt-2": ["bytes"], "smollm": ["digits", "bytes"]}
"""What cuts the text, by llama.cpp's name: regexes, single digits, GPT-2's own regex (`bytes`)."""

_IGNORES_MERGES = ("llama-bpe",)  # a word that is a token is taken whole, whatever the merges would make of it


def pre_tokenizer_name(content: dict[str, Any], path: Path) -> str:
    """Return llama.cpp's name for the way in which a tokenizer cuts text; `default` for SentencePiece, which does not.

    Args:
        content: of `tokenizer.json`.
        path: of it, for messages.

    Raises:
        UserError: it is another kind of tokenizer, or llama.cpp's is not known to do the same.
    """
    for token in content.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(
                f"{path}: --format gguf: the token {token['content']!r} takes spaces around it, or stands alone as a "
                "word; llama.cpp's tokens do not."
            )
    if is_sentencepiece(content):
        check_sentencepiece(content, path)
        return "default"
    return _byte_level_name(content, path)


def _byte_level_name(content: dict[str, Any], path: Path) -> str:
    model = content["model"]
    plain = all(not model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"))
    pieces = _pieces(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not plain or pieces is None:
        raise UserError(
            f"{path}: --format gguf writes byte-level BPE vocabularies (such as Qwen's and Llama 3's) and "
            "SentencePiece's BPE with byte_fallback (Llama 2's, Vicuna's); this is another."
        )
    name = next((name for name, cuts in _PRE_TOKENIZERS.items() if cuts == pieces), None)
    if name is None:
        raise UserError(
            f"{path}: --format gguf: the text is cut by {pieces}, for which no name of llama.cpp's is known here. "
            f"Known are those of {', '.join(_PRE_TOKENIZERS)}."
        )
    if bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
        raise UserError(f"{path}: --format gguf: ignore_merges is not what llama.cpp takes for `{name}`.")
    if (normalizer := content.get("normalizer")) not in (None, {"type": "NFC"}):
        raise UserError(f"{path}: --format gguf: llama.cpp has no normalizer {json.dumps(normalizer):.100}.")
    return name


def _pieces(pre_tokenizer: Any) -> list[str] | None:
    """Return what cuts the text, in order; None where it does not end in bytes."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found = []
    for step in steps:
        if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex", "a fixed string"))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif step["type"] == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
            found += ["bytes"] if step.get("use_regex", True) else []
        else:
            found.append(step["type"])
    return found if steps and steps[-1]["type"] == "ByteLevel" else None


def add_tokenizer_fields(
    writer: GGUFWriter, folder: Path, vocab_size: int, ends: list[int], tokenizer: Any, suppressed: list[int]
) -> None:
    """Add the tokenizer's fields.

    Args:
        writer: of `model.gguf`.
        folder: the model's.
        vocab_size: rows of the embedding; those without a token get a name that nothing writes.
        ends: tokens that end an answer, the first one first.
        tokenizer: of the processor, for its bos and pad.
        suppressed: tokens that are never generated.

    Raises:
        UserError: see `pre_tokenizer_name`.
    """
    path = folder / "tokenizer.json"
    content = read_json(path)
    texts, kinds = vocabulary(content, vocab_size)
    merges = content["model"]["merges"]
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    if is_sentencepiece(content):
        found = scores(content, path)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([found.get(text, -float(len(merges))) for text in texts])
        writer.add_add_space_prefix(space_scheme(content, path) == "prepend")
        if tokenizer.unk_token_id is not None:
            writer.add_unk_token_id(tokenizer.unk_token_id)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(content, path))
        writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    kinds_of_ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for number, add in zip(ends, kinds_of_ends, strict=False):
        add(number)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_array("tokenizer.ggml.suppress_tokens", suppressed)


def spaces_of(folder: Path) -> Spaces | None:
    """Return the spaces that the chat template has to write for a folder's tokenizer."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    if not is_sentencepiece(content) or (scheme := space_scheme(content, path)) not in ("first", "always"):
        return None
    return Spaces(scheme == "always", [token["content"] for token in content.get("added_tokens", [])])


def vocabulary(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the kind (`gguf.TokenType`) of every row of the embedding.

    Args:
        content: of `tokenizer.json`.
        vocab_size: rows of the embedding.

    Raises:
        UserError: a token has no row.
    """
    numbers = [*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", []))]
    if max(numbers, default=0) >= vocab_size:
        raise UserError(f"tokenizer.json has a token {max(numbers)}, but the embedding has {vocab_size} rows.")
    texts = [f"[unused {number}]" for number in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for text, number in content["model"]["vocab"].items():
        texts[number], kinds[number] = text, int(kind_of(text, content) or TokenType.NORMAL)
    for token in content.get("added_tokens", []):
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], kinds[token["id"]] = token["content"], int(kind_of(token["content"], content) or kind)
    return texts, kinds
