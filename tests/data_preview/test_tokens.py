"""Tokens as text: nothing is lost, characters stay whole, and what cannot be seen is named."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_parts
from llavaforge.data_preview.tokens import Reader
from llavaforge.report.glyphs import glyphs, visible

TEXT = "naïve 日本 😀👩‍👧 שלום\n\tend"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_parts.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_pieces_are_whole_characters_and_hold_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT).input_ids
    groups = Reader(tokenizer, image_token_id=-1, num_image_tokens=4).groups(ids, [])
    assert [token for group in groups for token in group.ids] == ids
    assert "".join(group.text for group in groups) == TEXT
    assert not any("\ufffd" in group.text for group in groups)
    assert {len(group.ids) for group in groups if group.text in ("ï", "日", "😀")} == {2, 3, 4}


def test_supervised_special_and_image_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = [start, *tokenizer("a").input_ids, *tokenizer("b").input_ids, end]
    groups = Reader(tokenizer, image_token_id=ids[1], num_image_tokens=4).groups(ids, [2, 4])
    assert [group.is_supervised for group in groups] == [False, False, True, True]
    assert [group.is_special for group in groups] == [True, False, False, True]
    assert [group.num_image_tokens for group in groups] == [0, 4, 0, 0]


def test_a_broken_character_ends_with_its_span(tokenizer: PreTrainedTokenizerFast) -> None:
    emoji = tokenizer("😀").input_ids
    ids = [*emoji[:2], *tokenizer("ab").input_ids, *emoji[:3]]
    groups = Reader(tokenizer, -1, 4).groups(ids, [1, 2])
    assert [token for group in groups for token in group.ids] == ids
    assert [group.ids for group in groups if group.is_supervised] == [(emoji[1],)]


def test_spaces_that_decoding_alone_would_strip_are_kept() -> None:
    """SentencePiece-style tokens such as `▁red`, whose first space a decoder removes."""
    words = {"▁a": 0, "▁red": 1, "▁square": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    groups = Reader(PreTrainedTokenizerFast(tokenizer_object=backend), -1, 4).groups([0, 1, 2], [1, 3])
    assert [group.text for group in groups] == ["a", " red", " square"]


def test_invisible_characters_are_named_and_do_not_act() -> None:
    text = "a\u202eb\x1b[31m\u00a0\u200b\u200d\n\tc"
    assert visible(text) == "a<U+202E>b<U+001B>[31m<U+00A0><U+200B>\u200d\n\tc"
    assert [part.sign for part in glyphs("x\n\ty")] == ["", "⏎", "⇥", ""]
    assert "".join(part.text for part in glyphs("x\n\ty")) == "x\n\ty"
    assert glyphs("") == []
