"""The generated world: same seed same bytes, the layout, true answers, and that guessing does not pay."""

import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavaforge.errors import UserError
from llavaforge.starter.shapes import (
    COLOURS,
    DESCRIBE_PROMPTS,
    POSITIONS,
    SHAPES,
    Scene,
    caption,
    questions,
    render,
    sample_scene,
    write_shapes,
)

NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(folder, NUM_SAMPLES, seed=3)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_other_seed_other_scenes(shapes_dir: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "again", NUM_SAMPLES, seed=3)
    write_shapes(tmp_path / "other", NUM_SAMPLES, seed=4)
    first = read_tree(shapes_dir)
    assert read_tree(tmp_path / "again") == first
    assert read_tree(tmp_path / "other")["train/chat.json"] != first["train/chat.json"]


def test_a_larger_data_set_begins_with_the_smaller_one(shapes_dir: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "larger", NUM_SAMPLES + 7, seed=3)
    small = json.loads((shapes_dir / "train" / "questions.json").read_text())
    large = json.loads((tmp_path / "larger" / "train" / "questions.json").read_text())
    assert large[: len(small)] == small


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_layout(shapes_dir: Path, split: str) -> None:
    images = {path.name for path in (shapes_dir / split / "images").iterdir()}
    captions = json.loads((shapes_dir / split / "chat.json").read_text())
    answers = json.loads((shapes_dir / split / "questions.json").read_text())
    assert len(captions) == len(images) == {"train": NUM_SAMPLES, "heldout": 100}[split]
    assert {row["image"] for row in captions} == {row["image"] for row in answers} == images
    for rows in (captions, answers):
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            human, gpt = row["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].startswith("<image>\n") or human["value"].endswith("\n<image>")
            assert human["value"].count("<image>") == 1
    before = sum(row["conversations"][0]["value"].startswith("<image>") for row in captions)
    assert 0.2 < before / len(captions) < 0.8
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in answers)
    assert {re.sub("\n?<image>\n?", "", row["conversations"][0]["value"]) for row in captions} <= {*DESCRIBE_PROMPTS}
    assert all(len(row["conversations"][1]["value"].split()) == 1 for row in answers)


def test_no_scene_is_in_both_splits_under_any_seed() -> None:
    rng = random.Random(0)
    train = {sample_scene(rng, "train").key for _ in range(3000)}
    heldout = {sample_scene(rng, "heldout").key for _ in range(3000)}
    assert not train & heldout
    assert len(heldout) > 500


def test_captions_on_disk_share_nothing_between_splits(shapes_dir: Path) -> None:
    def facts(split: str) -> set[tuple[str, ...]]:
        rows = json.loads((shapes_dir / split / "chat.json").read_text())
        found = (re.findall(r"(\w+ \w+) at the (\w+ \w+)", row["conversations"][1]["value"]) for row in rows)
        return {tuple(" ".join(fact) for fact in facts) for facts in found}

    assert not facts("train") & facts("heldout")


def test_the_pixels_show_what_the_scene_says() -> None:
    rng = random.Random(1)
    names = list(COLOURS)
    palette = np.array(list(COLOURS.values()))
    for _ in range(100):
        scene = sample_scene(rng, "train")
        pixels = np.asarray(render(scene)).astype(int)
        half = pixels.shape[0] // 2
        for position, (column, row) in POSITIONS.items():
            cell = pixels[row * half : (row + 1) * half, column * half : (column + 1) * half]
            thing = next((thing for thing in scene.objects if thing.position == position), None)
            if thing is None:
                assert (cell == scene.background).all()
                continue
            x, y = thing.centre
            nearest = np.abs(palette - pixels[y, x]).sum(axis=1).argmin()
            assert names[nearest] == thing.colour
            corner_is_background = (cell[0, 0] == scene.background).all()
            assert corner_is_background, "an object reaches over its cell"


def test_shapes_differ_in_pixels() -> None:
    rng = random.Random(2)
    scene = next(s for s in iter(lambda: sample_scene(rng, "train"), None) if len(s.objects) == 1)
    thing = scene.objects[0]
    drawings = []
    for shape in SHAPES:
        changed = type(thing)(thing.colour, shape, thing.position, thing.centre, thing.radius, thing.rgb)
        drawings.append(np.asarray(render(Scene((changed,), scene.background))).astype(int))
    for index, first in enumerate(drawings):
        for second in drawings[:index]:
            assert (np.abs(first - second).sum(axis=2) > 60).sum() > 100


def answer_from_caption(text: str, question: str) -> str:
    """Answer with regular expressions from the caption: another way than the code under test."""
    facts = [tuple(fact) for fact in re.findall(r"(\w+) (\w+) at the (\w+ \w+)", text)]
    if found := re.fullmatch(r"What colour is the (\w+)\?", question):
        answers = [colour for colour, shape, _ in facts if shape == found[1]]
    elif found := re.fullmatch(r"What shape is the (\w+) thing\?", question):
        answers = [shape for colour, shape, _ in facts if colour == found[1]]
    else:
        raise AssertionError(f"unknown question: {question}")
    assert len(answers) == 1, f"{question} is ambiguous or pointless for: {text}"
    return answers[0]


def test_every_answer_follows_from_the_caption() -> None:
    rng = random.Random(5)
    for _ in range(1500):
        scene = sample_scene(rng, "train")
        for question, answer in questions(scene, rng):
            assert answer_from_caption(caption(scene), question) == answer, (caption(scene), question)


def kind_of(question: str) -> str:
    words = re.findall(r"\w+", question)
    return " ".join("C" if word in COLOURS else "S" if word in SHAPES else word for word in words)


@pytest.mark.parametrize("key", [kind_of, str], ids=["kind of question", "whole question"])
def test_guessing_from_the_question_does_not_pay(key) -> None:
    """A guesser that has seen 16,000 questions with answers is at most 4 points above the majority."""
    rng = random.Random(6)

    def draw(split, num_scenes):
        return [pair for _ in range(num_scenes) for pair in questions(sample_scene(rng, split), rng)]

    seen = defaultdict(Counter)
    for question, answer in draw("train", 8000):
        seen[key(question)][answer] += 1
    asked = draw("heldout", 4000)
    majority_share = Counter(answer for _, answer in asked).most_common(1)[0][1] / len(asked)
    guesses = {question: seen[question].most_common(1)[0][0] for question in seen}
    guessed_right = sum(guesses.get(key(question), "circle") == answer for question, answer in asked) / len(asked)
    assert 0.1 < majority_share < 0.2
    assert guessed_right < majority_share + 0.04


def test_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not an empty folder.*--output_dir"):
        write_shapes(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_refuses_a_number_below_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_samples is 0"):
        write_shapes(tmp_path / "data", 0)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    summary = write_shapes(tmp_path / "data", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert summary["train"]["num_images"] == 2
    with Image.open(tmp_path / "data" / "train" / "images" / "shapes_train_000000.jpg") as image:
        assert image.mode == "RGB"


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llavaforge.starter.shapes.caption", fail)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "data", 2)
    assert not list(tmp_path.iterdir())
