"""SentencePiece vocabularies: llama.cpp's merges by score, and the spaces around them, give the folder's own tokens."""

import heapq
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import tiny_parts
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import UserError
from llavaforge.gguf_folder.files import GgufFile
from llavaforge.gguf_folder.sentencepiece import scores
from llavaforge.gguf_folder.tokenizer import pre_tokenizer_name
from llavaforge.gguf_folder.write import write_gguf_folder
from llavaforge.join.parts import customize_model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
DOCS = Path(__file__).parents[2] / "docs"
TEXTS = (
    "", " ", "   a", "a  b   c    d ", " " * 37, "\n", "\n\n  x", "\t\tx=1;\r\n", "漢字 한국어", "🦙🦙",
    "naïve é e\u0301 ½ ٣",
    "1234567 3.14", "a\u00a0b\u2003c\u200b", "▁", "▁a ▁ b", "<0x0A>", "</s>",
    "</s>USER: a</s> b", "<s>[INST] x </s><s> y",
    "<s> </s>", "a<unk> b<unk>", "<image>\nWhat?", "What <image> and<image>", " <image> ", "ananana" * 5, "-" * 50,
)  # fmt: skip


@dataclass
class LlamaCpp:
    """llama.cpp's tokenizer of kind `llama`, from the fields of a file alone."""

    numbers: dict[str, int]
    scores: list[float]
    cuts_at: list[str]
    adds_space: bool = False

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "LlamaCpp":
        assert fields["tokenizer.ggml.model"] == "llama"
        texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        special = [text for text, kind in zip(texts, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
        numbers = {text: number for number, text in enumerate(texts)}
        return cls(numbers, fields["tokenizer.ggml.scores"], special, fields["tokenizer.ggml.add_space_prefix"])

    def tokens(self, text: str) -> list[int]:
        found, after_special = [], True
        longest_first = sorted(self.cuts_at, key=len, reverse=True)
        for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if piece in self.cuts_at:
                found.append(self.numbers[piece])
            elif piece:
                space = " " if self.adds_space and after_special else ""
                found += self.merged((space + piece).replace(" ", "▁"))
            after_special = after_special if not piece else piece in self.cuts_at
        return found

    def merged(self, text: str) -> list[int]:
        """Merge, again and again, the neighbours whose result has the highest score, the leftmost of equal ones."""
        symbols, following = dict(enumerate(text)), {number: number + 1 for number in range(len(text))}
        before = {after: one for one, after in following.items()}
        queue: list[tuple[float, int, int, str]] = []

        def add(left: int | None, right: int | None) -> None:
            if left in symbols and right in symbols:
                result = symbols[left] + symbols[right]
                if result in self.numbers:
                    heapq.heappush(queue, (-self.scores[self.numbers[result]], left, right, result))

        for left in list(symbols):
            add(left, left + 1)
        while queue:
            _, left, right, result = heapq.heappop(queue)
            if symbols.get(left, "") + symbols.get(right, "") != result or following.get(left) != right:
                continue
            symbols[left] = result
            del symbols[right]
            following[left] = following[right]
            before[following[left]] = left
            add(before.get(left), left)
            add(left, following[left])
        found = []
        for text in symbols.values():
            bytes_of = [f"<0x{byte:02X}>" for byte in text.encode()]
            found += [self.numbers[one] for one in ([text] if text in self.numbers else bytes_of)]
        return found


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return (DOCS / "data.md").read_text().splitlines()


@pytest.fixture(scope="module")
def llava(tiny_siglip: Path, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from where the tokenizer puts spaces to a joined model; its prompt is a message's content alone."""
    made: dict[str, Path] = {}

    def make(spaces: str) -> Path:
        if spaces not in made:
            folder = tmp_path_factory.mktemp(spaces)
            part = tiny_parts.save_language_model(folder / "lm", "llama", vocab_size=1024, eos_token_id=2)
            tiny_parts.save_sentencepiece(part, spaces, corpus=corpus, num_tokens=900, chat_template=PLAIN)
            made[spaces] = folder / "model"
            parts = {"vision_tower": str(tiny_siglip), "language_model": str(part)}
            customize_model(CustomizeModelConfig(output_dir=made[spaces], **parts))
        return made[spaces]

    return make


@pytest.mark.parametrize("spaces", tiny_parts.SPACES)
def test_llama_cpp_makes_the_folder_s_tokens_of_every_prompt(
    spaces: str, llava: Callable[[str], Path], tmp_path: Path
) -> None:
    write_gguf_folder(tmp_path, llava(spaces), "auto")
    file = GgufFile(tmp_path / "model.gguf")
    llama_cpp, template = LlamaCpp.of(file.fields), file.fields["tokenizer.chat_template"]
    assert llama_cpp.adds_space is (spaces == "prepend")
    tokenizer = AutoProcessor.from_pretrained(llava(spaces)).tokenizer
    lines = (DOCS / "using.md").read_text().splitlines()
    randomly, words = random.Random(0), [*tokenizer.get_vocab(), " ", "  ", "é", "<image>", "</s>", "\n"]
    mixed = ["".join(randomly.choices(words, k=9)).replace("▁", " ") for _ in range(200)]
    for text in [*TEXTS, *lines, *mixed]:
        # A marker would be moved to the front of a user's message; here the text is to stay as it is.
        messages = [{"role": "assistant", "content": text.replace("<image>", "<__media_f8Q_x2__>")}]
        prompt = render_jinja_template([messages], chat_template=template)[0][0]
        pieces = re.split("(<__media_f8Q_x2__>)", prompt)  # each is tokenised by itself
        ids = [llama_cpp.tokens("<image>" if "<__media_" in piece else piece) for piece in pieces]
        expected = _ids(tokenizer, text)
        assert [*chain(*ids)] == expected, f"{text!r}: {tokenizer.convert_ids_to_tokens(expected)}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens as training makes them; a newline stands between an image and words that touch it."""
    text = re.sub(r"(?<=\S)<image>", "\n<image>", text)
    text = re.sub(r"<image>(?=\S)", "<image>\n", text)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_merges_by_score_are_the_list_s_or_the_list_is_refused() -> None:
    """Random lists of merges: with the scores that are written, every short text gives the same tokens."""
    texts = ["".join(letters) for length in range(1, 7) for letters in product("abc", repeat=length)]
    randomly, num_refused, num_of_several = random.Random(0), 0, 0
    for _ in range(100):
        vocabulary, merges = ["a", "b", "c"], []
        for _ in range(6):
            left, right = randomly.choices(vocabulary, k=2)
            if (left, right) not in merges and len(left + right) < 6:
                merges.append((left, right))
                vocabulary += [left + right] if left + right not in vocabulary else []
        cuts = [(text[:at], text[at:]) for text in vocabulary for at in range(1, len(text))]
        merges += [one for one in cuts if set(one) <= set(vocabulary) and randomly.random() < 0.5]
        merges = list(dict.fromkeys(merges))
        randomly.shuffle(merges)
        numbers = {text: number for number, text in enumerate(vocabulary)}
        try:
            found = scores({"model": {"vocab": numbers, "merges": merges}}, Path("tokenizer.json"))
        except UserError:
            num_refused += 1
            continue
        num_of_several += len({left + right for left, right in merges}) < len(merges)
        llama_cpp = LlamaCpp(numbers, [found.get(text, -99.0) for text in vocabulary], [])
        theirs = Tokenizer(models.BPE(numbers, merges))
        unlike = [text for text in texts if llama_cpp.merged(text) != theirs.encode(text).ids]
        assert not unlike, f"{unlike[0]!r} with {merges}"
    assert num_refused > 10 and num_of_several > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"dropout": 0.1}}, "no dropout"),
        ({"model": {"ignore_merges": True}}, "no ignore_merges"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "no end_of_word_suffix"),
        ({"model": {"merges": []}}, "the merges leave .*, which is a token, as"),
        ({"model": {"vocab": {"<unk>": 0, "▁": 1}, "merges": []}}, "no token <0x00>"),
        ({"normalizer": {"type": "Lowercase"}}, "Known are Prepend and Replace, or Metaspace"),
        ({"pre_tokenizer": None}, "Known are Prepend and Replace, or Metaspace"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "Known are Prepend and Replace, or Metaspace"),
        ({"pre_tokenizer": {"replacement": "_"}}, "Known are Prepend and Replace, or Metaspace"),
        ({"pre_tokenizer": {"prepend_scheme": None}}, "prepend_scheme is none of first, always, never"),
        ({"pre_tokenizer": {"split": True}}, "'▁▁' has one inside"),
        ({"added_tokens": [{"id": 0, "content": "<x>", "rstrip": True}]}, "spaces around it"),
        ({"added_tokens": [{"id": 0, "content": "< x", "normalized": True}]}, "is `normalized`"),
        ({"added_tokens": [{"id": 0, "content": "▁▁", "normalized": False}], "model": {"merges": []}}, "'▁▁'"),
    ],
)
def test_a_vocabulary_that_llama_cpp_would_read_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        changed("first", change, tmp_path)


@pytest.mark.parametrize(
    ("spaces", "token", "message"),
    [
        ("prepend", {"content": "<x>", "normalized": True}, "is `normalized`"),
        ("always", {"content": "/s"}, "is a part of another"),
    ],
)
def test_tokens_that_the_spaces_around_them_make_unlike_are_refused(
    spaces: str, token: dict[str, Any], message: str, tmp_path: Path
) -> None:
    added = [{"id": 0, "content": "</s>"}, {"id": 1, **token}]
    with pytest.raises(UserError, match=message):
        changed(spaces, {"added_tokens": added}, tmp_path)
    assert changed("never", {"added_tokens": added}, tmp_path) == "default"


def changed(spaces: str, change: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of a changed tokenizer's way of cutting."""
    tiny_parts.save_sentencepiece(folder, spaces)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(content[key], dict) and value else value
    return pre_tokenizer_name(content, path)


def test_a_vocabulary_without_spaces_inside_its_tokens_may_be_split_at_them(tmp_path: Path) -> None:
    tiny_parts.save_sentencepiece(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if "▁" not in text[1:]}
    model["merges"] = [pair for pair in model["merges"] if "▁" not in "".join(pair)[1:]]
    assert changed("first", {"model": model, "pre_tokenizer": {"split": True}}, tmp_path) == "default"


def test_fields_say_what_each_token_is(llava: Callable[[str], Path], tmp_path: Path) -> None:
    write_gguf_folder(tmp_path, llava("prepend"), "auto")
    fields = GgufFile(tmp_path / "model.gguf").fields
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[text] for text in ("<unk>", "<s>", "</s>", "<image>")] == [UNKNOWN, CONTROL, CONTROL, CONTROL]
    assert [kinds[text] for text in ("<0x00>", "<0xFF>", "▁", "▁▁")] == [BYTE, BYTE, NORMAL, NORMAL]
    assert list(kinds.values()).count(BYTE) == 256 and kinds["[unused 1023]"] == UNUSED
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2] and fields["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.merges" not in fields and len(fields["tokenizer.ggml.scores"]) == 1024
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    own = AutoTokenizer.from_pretrained(llava("prepend"))
    text = "USER: What is in the picture?   ASSISTANT: a 漢 </s>"
    assert other.tokenize(text) == own.tokenize(text)
