"""Qwen1.5's own tokenizer, made offline: its whole vocabulary is in the wheel `dashscope`.

Used by `bench/data/records.py` and by the tests of the published recipe (`tests/join/test_published_recipe.py`).
"""

import base64
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Of Qwen1.5's tokenizer.json: digits one by one.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Converter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = Path(tiktoken_url).read_bytes().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with its three special tokens: ids 151643, 151644, 151645."""
    vocabulary = resources.files("dashscope").joinpath("resources/qwen.tiktoken")
    tokenizer = _Converter(str(vocabulary), pattern=_PATTERN).converted()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
