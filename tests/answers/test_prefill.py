"""What comes after a pass over a pack is what comes after each prompt alone, by the stock model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavaforge.answers.choices import Chooser, candidates
from llavaforge.answers.generate import Answerer, Question
from llavaforge.answers.prefill import Prefill
from llavaforge.config.schema import CustomizeModelConfig, SampleOptions
from llavaforge.data.index.open import sample_builder
from llavaforge.data.rows.records import parse_record
from llavaforge.join.parts import customize_model
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.step import StepModule
from train_tools import open_packs, pack_of, stock_log_likelihood, train_config

MERGING = "{% for m in messages %}{{ ' USER: ' if m.role == 'user' else ' ASSISTANT: ' }}{{ m.content }}{% endfor %}"
OPTIONS = "\nA. red\nB. a much longer option\nC. blue\nAnswer with the letter."


def rows_of(images: list[str]) -> list[dict[str, Any]]:
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]

    return [
        {"id": "0", "image": images[0], "conversations": turns("<image>\nWhat?" + OPTIONS, "red")},
        {
            "id": "1",
            "image": images[1:3],
            "conversations": turns(
                "<image>\nIs it red?", "a circle", "And this? <image>" + OPTIONS + " Quickly, please.", "blue"
            ),
        },
        {
            "id": "2",
            "image": images[3],
            "conversations": turns("<image>\nA longer question of it?" + OPTIONS + " Which is it, and why?", "red"),
        },
    ]


def joined(folder: Path, clip: Path, language_model: Path, template: str | None) -> LoadedModel:
    options: dict[str, Any] = {}
    if template is not None:
        (folder / "template.jinja").write_text(template)
        options["chat_template"] = folder / "template.jinja"
    customize_model(
        CustomizeModelConfig(
            vision_tower=str(clip), language_model=str(language_model), output_dir=folder / "model", **options
        )
    )
    return load_model(str(folder / "model"))


@pytest.mark.parametrize(
    ("family", "style", "template"),
    [
        ("qwen2", "chat", None),
        ("qwen2", "plain", None),
        ("qwen2", "chat", MERGING),
        ("qwen2_sliding", "chat", None),
        ("mistral", "chat", None),
        ("llama", "chat", None),
    ],
    ids=["qwen2", "plain", "merging", "sliding", "mistral", "odd settings"],
)
def test_answers_and_choices_after_a_pack_are_those_of_each_alone(
    family: str, style: Any, template: str | None, tiny_clip: Path, tiny_lm: Callable[[str], Path], shapes: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    loaded = joined(tmp_path, tiny_clip, tiny_lm(family), template)
    stock, images = load_model(str(loaded.path)), shapes / "heldout" / "images"
    rows = rows_of([path.name for path in sorted(images.iterdir())][:4])
    if style == "plain":
        rows = [row for row in rows if isinstance(row["image"], str)]  # it has no place for a second question
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(images)
    (data / "data.json").write_text(json.dumps(rows))
    options = SampleOptions(prompt_style=style)
    _, dataset = open_packs(loaded, train_config(loaded.path, data, tmp_path, prompt_style=style))
    pack = pack_of(dataset, *range(len(rows)))
    records = [parse_record(row) for row in rows]
    pixels = pack.pixels_ICHW.split([len(record.images) for record in records])
    builder = sample_builder(loaded.processor, loaded.num_image_tokens, options)

    prefill = Prefill(StepModule(loaded.model, loaded.preprocessing).eval(), pack, is_continued=True)
    chosen = Chooser(loaded.model, builder)(records, prefill)
    likelihoods = [
        {letter: stock_log_likelihood(stock, builder, one, of_one) for letter, one in candidates(record).items()}
        for record, of_one in zip(records, pixels, strict=True)
    ]
    assert chosen == [max(mine, key=lambda letter: mine[letter]) for mine in likelihoods]
    if family == "llama":  # what a language model's generation_config.json may hold
        loaded.model.generation_config.update(use_cache=False, num_beams=2, cache_implementation="static")
    questions = [
        Question(record.turns[:-1], list(of_one.numpy())) for record, of_one in zip(records, pixels, strict=True)
    ]
    alone = Answerer(stock, options, max_new_tokens=8)
    expected = [alone([question])[0] for question in questions]
    found = Answerer(loaded, options, max_new_tokens=8).after(prefill, questions)
    assert found == expected and len(set(expected)) > 1
