"""Without `variants` the train types are compared, as far as they fit; and what is said of a difference is so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bad_comparisons import write

from llavaforge.cli import parse
from llavaforge.comparison import variants
from llavaforge.comparison.measures import in_words
from llavaforge.comparison.spread import difference
from llavaforge.comparison.variants import evaluate_options, open_variants
from llavaforge.config.schema import CompareConfig
from llavaforge.errors import UserError


def config_of(words: list[str]) -> CompareConfig:
    config = parse(words[0], words[1:])
    assert isinstance(config, CompareConfig)
    return config


def test_without_variants_the_train_types_that_fit_are_compared(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's rates are those of its own train type."""
    rates = {"learning_rate": 0.5, "projector_learning_rate": 0.25, "vision_learning_rate": 0.125}
    config = config_of(write(tmp_path, tiny_llava, shapes, variants=None, cache_vision_features="disk", **rates))
    opened, left_out = open_variants(config)
    assert not left_out
    assert {one.name: one.rates for one in opened} == {
        "projector": {"projector": 1e-3},
        "freeze_vision": {"projector": 2e-5, "language_model": 2e-5},
        "use_lora": {"projector": 0.25, "lora": 0.5},
        "full": {"vision_tower": pytest.approx(2e-6), "projector": 2e-5, "language_model": 2e-5},
    }
    assert [one.values["cache_vision_features"] for one in opened] == ["disk", "disk", "disk", "off"]
    learning = {one.name: one.num_learning for one in opened}
    assert learning["projector"] < learning["freeze_vision"] < learning["full"] < opened[0].num_parameters
    assert len({one.flops_per_sample for one in opened}) == 4
    sizes: dict[str, Any] = {one.name: one.memory_bytes for one in opened}
    monkeypatch.setattr(variants, "total_memory", lambda device: max(sizes.values()) - 1)
    opened, left_out = open_variants(config)
    assert [one.name for one in opened] == [name for name in sizes if sizes[name] < max(sizes.values())]
    assert len(opened) == 3 and "the device has" in next(iter(left_out.values()))
    monkeypatch.setattr(variants, "total_memory", lambda device: 1)
    with pytest.raises(UserError, match="fewer than two train types fit"):
        open_variants(config)


ON_THE_WAY = ("eval_generate_samples", "eval_metrics", "eval_max_new_tokens")


def on_the_way(words: list[str]) -> dict[str, tuple[Any, ...]]:
    opened, _ = open_variants(config_of(words))
    found = {one.name: tuple(one.values.get(name) for name in ON_THE_WAY) for one in opened}
    assert found == {one.name: tuple(one.identity[name] for name in ON_THE_WAY) for one in opened}
    return found


def test_what_is_measured_along_the_way(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    own = {
        "none of it": {},
        "a number": {"eval_generate_samples": 5},
        "nothing": {"eval_generate_samples": 0},
        "metrics": {"eval_metrics": ["anls", "bleu"], "eval_max_new_tokens": 3},
        "zero3": {"deepspeed": "zero3"},
    }
    named = {name.replace(" ", "-"): {"train_type": "projector"} | changes for name, changes in own.items()}
    assert on_the_way(write(tmp_path, tiny_llava, shapes, variants=named, max_new_tokens=8)) == {
        "none-of-it": (32, ["exact_match"], 8),
        "a-number": (5, ["exact_match"], 8),
        "nothing": (0, ["exact_match"], 8),
        "metrics": (32, ["anls", "bleu"], 3),
        "zero3": (0, ["exact_match"], 8),
    }
    words = write(tmp_path, tiny_llava, shapes, metrics=["bleu", "anls"])
    assert set(map(repr, on_the_way(words).values())) == {"(32, ['anls'], 32)"}  # the first in the order of `evaluate`
    words = write(tmp_path, tiny_llava, shapes, metrics=["none"], eval_generate_samples=5)
    assert set(on_the_way(words).values()) == {(0, None, None)}


def test_held_out_data_may_be_an_entry_with_its_own_bound(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    entry = {"path": str(shapes / "heldout" / "questions.json"), "max_samples": 7}
    for most, expected in ((None, 7), (5, 5), (9, 7)):
        words = write(tmp_path, tiny_llava, shapes, eval_data_path=None, eval_data=[entry], max_eval_samples=most)
        opened, _ = open_variants(config_of(words))
        assert [len(one.held_out.rows) for one in opened] == [expected] * 2


def test_held_out_data_may_be_several_data_sets_or_a_split(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    """(Every seed and variant measures the same records: `test_runs_of_all_seeds_hold_out_the_same`.)"""
    heldout = shapes / "heldout"
    entries = [
        {"path": str(heldout / "questions.json"), "max_samples": 3},
        {"path": str(heldout / "chat.json"), "max_samples": 4, "format": "llava"},
    ]
    words = write(tmp_path, tiny_llava, shapes, eval_data_path=None, eval_data=entries)
    assert [len(one.held_out.rows) for one in open_variants(config_of(words))[0]] == [7, 7]
    words = write(tmp_path, tiny_llava, shapes, eval_data_path=None, validation_split=6)
    config = config_of(words)
    one, other = open_variants(config)[0]
    assert one.held_out.records == other.held_out.records and len(one.held_out.rows) == 6
    assert one.values["validation_split"] == 6 and "eval_data" not in one.values
    assert evaluate_options(config, one.values | {"max_length": 99}, "model").held_out  # prepared as the run says


def test_what_is_measured_along_the_way_of_other_answers(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    """Captions are too long to be right or wrong; where ten people answered, all of them count."""
    words = write(tmp_path, tiny_llava, shapes, eval_data_path=str(shapes / "heldout" / "chat.json"))
    (captions, _), _ = open_variants(config_of(words))
    assert captions.values["eval_generate_samples"] == 0
    people = Path(shutil.copytree(shapes / "heldout", tmp_path / "people")) / "questions.json"
    rows = [row | {"answers": ["red"] * 10} for row in json.loads(people.read_text())]
    people.write_text(json.dumps(rows))
    words = write(tmp_path, tiny_llava, shapes, eval_data_path=str(people))
    (vqa, _), _ = open_variants(config_of(words))
    assert vqa.values["eval_metrics"] == ["vqa"]


@pytest.mark.parametrize(
    ("measure", "sign", "begins"),
    [
        ("loss", 1, "b has a lower held-out loss than a, by 2.0000 (95 % interval -0.4841 to 4.4841; p = 0.074"),
        ("loss", -1, "a has a lower held-out loss than b, by 2.0000 (95 % interval -0.4841 to 4.4841; p = 0.074"),
        ("exact_match", 0.1, "a has a higher exact match than b, by 20.0 points (95 % interval -4.8 to 44.8 points; p"),
        ("cider", -1, "b has a higher cider than a, by 2.0000 (95 % interval -0.4841 to 4.4841; p"),
    ],
)
def test_a_sentence_names_the_better_one(measure: str, sign: float, begins: str) -> None:
    found = difference(measure, "a", "b", {0: sign, 1: 2 * sign, 2: 3 * sign}, dict.fromkeys(range(3), 0.0))
    assert in_words(replace(found, p_among_all=found.p)).startswith(begins)
