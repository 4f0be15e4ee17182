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
from llavaforge.comparison.variants import open_variants
from llavaforge.config.schema import CompareConfig
from llavaforge.errors import UserError


def config_of(words: list[str]) -> CompareConfig:
    config = parse(words[0], words[1:])
    assert isinstance(config, CompareConfig)
    return config


def test_the_recipes_rates_are_those_of_its_own_train_type(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 0.5, "projector_learning_rate": 0.25, "vision_learning_rate": 0.125}
    words = write(tmp_path, tiny_llava, shapes, variants=None, cache_vision_features="disk", **rates)
    opened, left_out = open_variants(config_of(words))
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


ON_THE_WAY = ("eval_generate_samples", "eval_metrics", "eval_max_new_tokens")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (32, ["exact_match"], 32)),
        ({"max_new_tokens": 8}, (32, ["exact_match"], 8)),
        ({"metrics": ["bleu", "anls"]}, (32, ["anls"], 32)),  # the order of `evaluate`
        ({"metrics": ["none"], "eval_generate_samples": 5}, (0, None, None)),
        ({"eval_generate_samples": 5}, (5, ["exact_match"], 32)),
        ({"eval_generate_samples": 0}, (0, ["exact_match"], 32)),
        ({"eval_metrics": ["anls", "bleu"], "eval_max_new_tokens": 3}, (32, ["anls", "bleu"], 3)),
        ({"deepspeed": "zero3"}, (0, ["exact_match"], 32)),
    ],
    ids=str,
)
def test_what_is_measured_along_the_way(
    changes: dict[str, Any], expected: tuple[Any, ...], tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    (one, other), _ = open_variants(config_of(write(tmp_path, tiny_llava, shapes, **changes)))
    for variant in (one, other):
        assert tuple(variant.values.get(name) for name in ON_THE_WAY) == expected
        assert tuple(variant.identity[name] for name in ON_THE_WAY) == expected


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


def test_a_train_type_that_does_not_fit_is_left_out(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(write(tmp_path, tiny_llava, shapes, variants=None, lora_r=4))
    sizes: dict[str, Any] = {one.name: one.memory_bytes for one in open_variants(config)[0]}
    monkeypatch.setattr(variants, "total_memory", lambda device: sizes["full"] - 1)
    opened, left_out = open_variants(config)
    assert [one.name for one in opened] == ["projector", "freeze_vision", "use_lora"]
    assert left_out.keys() == {"full"} and "the device has" in left_out["full"]
    monkeypatch.setattr(variants, "total_memory", lambda device: 1)
    with pytest.raises(UserError, match="fewer than two train types fit"):
        open_variants(config)


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
