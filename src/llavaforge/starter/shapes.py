r"""A generated world of coloured shapes, written in the layout of LLaVA-CC3M-Pretrain-595K.

In: a folder to create, a number of training images and a seed. Out: a train and a held-out split, each with captions
(`chat.json`), questions with one-word answers (`questions.json`) and `images/`.

One row of `chat.json`, and one of `questions.json`:

    {"id": "shapes_train_000007", "image": "shapes_train_000007.jpg", "conversations": [
        {"from": "human", "value": "Describe the image.\n<image>"},
        {"from": "gpt", "value": "There is a red circle at the top left and a blue star at the top right."}]}
    {"id": "shapes_train_000007-q0", "image": "shapes_train_000007.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat colour is the circle?"}, {"from": "gpt", "value": "red"}]}

Guessing without looking must not pay. Shapes and colours are equally likely by symmetry, so the best guess from the
question's text alone is one of eight colours or of six shapes, and as few questions ask for a shape, that is right
hardly more often than the commonest answer. Questions put the image first, as instruction data does; captions put it
before or after the instruction, as LLaVA-CC3M-Pretrain-595K does.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw

from llavaforge.config.schema import MakeShapesConfig
from llavaforge.errors import UserError
from llavaforge.results import MakeShapesResult, ShapesSplit

Split = Literal["train", "heldout"]
Rgb = tuple[int, int, int]

IMAGE_SIZE = 96
SUPERSAMPLING = 3
MIN_RADIUS, MAX_RADIUS = 14, 19
MIN_HELDOUT_IMAGES = 100
QUESTIONS_PER_IMAGE = 2

COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "green": (25, 150, 50),
    "blue": (30, 70, 215),
    "yellow": (245, 220, 40),
    "orange": (250, 135, 15),
    "purple": (135, 40, 160),
    "white": (248, 248, 248),
    "black": (12, 12, 12),
}
POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top right": (1, 0),
    "bottom left": (0, 1),
    "bottom right": (1, 1),
}
"""Name -> (column, row) in a grid of 2 x 2 cells; at most one object per cell."""

NUM_OBJECTS_WEIGHTS = {1: 0.25, 2: 0.75}
DESCRIBE_PROMPTS = (
    "Describe the image.",
    "Describe the image briefly.",
    "What is in the picture?",
    "Give a short description of the image.",
    "Write a caption for this picture.",
    "What does the image show?",
)
CAPTION_OPENINGS = ("There is ", "The image shows ", "Here is ", "")


def _polygon(num_points: int, inner: float, turn: float) -> tuple[tuple[float, float], ...]:
    """A star-like outline in a unit circle; every second point lies at the inner radius."""
    points = []
    for index in range(num_points):
        radius = 1.0 if index % 2 == 0 else inner
        angle = turn + 2 * math.pi * index / num_points
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return tuple(points)


OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": _polygon(48, 1.0, 0.0),
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)),
    "star": _polygon(10, 0.42, -math.pi / 2),
    "diamond": ((0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)),
    "cross": (
        *((-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3)),
        *((0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)),
    ),
}
"""Shape -> outline around (0, 0) in units of the radius; the centre is always inside."""

SHAPES = tuple(OUTLINES)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape; `centre` and `radius` are in pixels of an `IMAGE_SIZE` square."""

    colour: str
    shape: str
    position: str
    centre: tuple[int, int]
    radius: int
    rgb: Rgb

    @property
    def name(self) -> str:
        """Colour and shape, such as `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects of different colours and shapes, in reading order on a grey background."""

    objects: tuple[SceneObject, ...]
    background: Rgb

    @property
    def key(self) -> str:
        """What the scene says, without where exactly each pixel lies; splits never share a key."""
        return "; ".join(f"{thing.position}: {thing.name}" for thing in self.objects)

    @property
    def split(self) -> Split:
        """The split this scene belongs to under every seed: one key in ten is held out, by its hash."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return "heldout" if digest[0] < 26 else "train"

    def at(self, column: int, row: int) -> SceneObject | None:
        """The object in a cell of the grid, if there is one."""
        return next((thing for thing in self.objects if POSITIONS[thing.position] == (column, row)), None)


def sample_scene(rng: random.Random, split: Split, num_objects: int | None = None) -> Scene:
    """Draw a scene of one split, with jittered places, sizes and tints.

    Args:
        rng: the source of randomness.
        split: scenes of the other split are drawn again.
        num_objects: at most one per cell; None draws one or two (`NUM_OBJECTS_WEIGHTS`).
    """
    while True:
        scene = _sample_any_scene(rng, num_objects)
        if scene.split == split:
            return scene


def _sample_any_scene(rng: random.Random, num_objects: int | None) -> Scene:
    if num_objects is None:
        num_objects = rng.choices(list(NUM_OBJECTS_WEIGHTS), list(NUM_OBJECTS_WEIGHTS.values()))[0]
    chosen = set(rng.sample(list(POSITIONS), num_objects))
    grey = rng.randint(112, 144)
    names = zip(rng.sample(list(COLOURS), num_objects), rng.sample(SHAPES, num_objects), strict=True)
    objects = tuple(_sample_object(rng, position, *next(names)) for position in POSITIONS if position in chosen)
    return Scene(objects, (grey, grey, grey))


def _sample_object(rng: random.Random, position: str, colour: str, shape: str) -> SceneObject:
    radius = rng.randint(MIN_RADIUS, MAX_RADIUS)
    cell = IMAGE_SIZE // 2
    slack = cell // 2 - radius - 1
    column, row = POSITIONS[position]
    centre_x = cell * column + cell // 2 + rng.randint(-slack, slack)
    centre_y = cell * row + cell // 2 + rng.randint(-slack, slack)
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in COLOURS[colour])
    return SceneObject(colour, shape, position, (centre_x, centre_y), radius, (red, green, blue))


def render(scene: Scene) -> Image.Image:
    """Draw a scene: an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels, with smooth edges."""
    size = IMAGE_SIZE * SUPERSAMPLING
    image = Image.new("RGB", (size, size), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        (centre_x, centre_y), radius = thing.centre, thing.radius
        outline = [
            ((centre_x + radius * x + 0.5) * SUPERSAMPLING, (centre_y + radius * y + 0.5) * SUPERSAMPLING)
            for x, y in OUTLINES[thing.shape]
        ]
        draw.polygon(outline, fill=thing.rgb)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def caption(scene: Scene, opening: str = CAPTION_OPENINGS[0]) -> str:
    """Say every object's colour, shape and position, in reading order, after one of `CAPTION_OPENINGS`.

    Returns:
        One sentence, such as `There is a red circle at the top left and a blue star at the bottom left.`
    """
    parts = [f"{_article(thing.colour)} {thing.name} at the {thing.position}" for thing in scene.objects]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    sentence = f"{opening}{text}."
    return sentence[0].upper() + sentence[1:]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def questions(scene: Scene, rng: random.Random, num_questions: int = QUESTIONS_PER_IMAGE) -> list[tuple[str, str]]:
    """Draw different questions about a scene (it allows two), each with an answer of one word.

    Returns:
        Pairs of question and answer: the colour of each shape, and where there is one object alone its shape.
    """
    asked = [(f"What colour is the {thing.shape}?", thing.colour) for thing in scene.objects]
    if len(scene.objects) == 1:
        asked.append((f"What shape is the {scene.objects[0].colour} thing?", scene.objects[0].shape))
    rng.shuffle(asked)
    return asked[:num_questions]


def make_shapes(config: MakeShapesConfig) -> MakeShapesResult:
    """Do `llavaforge data make-shapes`; see `write_shapes`."""
    return write_shapes(config.output_dir, config.num_samples, config.seed)


def write_shapes(output_dir: Path, num_samples: int, seed: int = 0) -> MakeShapesResult:
    """Write a generated data set; the same arguments give the same bytes.

    Args:
        output_dir: the folder to create; it may exist if it is empty.
        num_samples: the number of training images; a tenth of it (at least `MIN_HELDOUT_IMAGES`) is held out.
        seed: chooses scenes, wording and questions.

    Returns:
        What was written: `output_dir`, `seed`, and images, questions and majority share of each split.

    Raises:
        UserError: if `output_dir` holds something already, or `num_samples` is below 1.
    """
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}; it must be at least 1. Ask for 1000, for example.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(
            f"{output_dir} exists and is not an empty folder; a data set needs a new or an empty one. "
            "Choose another --output_dir, or remove this one."
        )
    sizes: dict[Split, int] = {"train": num_samples, "heldout": max(num_samples // 10, MIN_HELDOUT_IMAGES)}
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished_dir = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        written = {split: _write_split(unfinished_dir / split, split, count, seed) for split, count in sizes.items()}
        unfinished_dir.chmod(0o755)
        os.replace(unfinished_dir, output_dir)
    except BaseException:
        shutil.rmtree(unfinished_dir, ignore_errors=True)
        raise
    return {"output_dir": str(output_dir), "seed": seed, "train": written["train"], "heldout": written["heldout"]}


def _write_split(split_dir: Path, split: Split, num_images: int, seed: int) -> ShapesSplit:
    (split_dir / "images").mkdir(parents=True)
    captions, answers = [], []
    for index in range(num_images):
        # One generator per image: an image does not change when the data set grows.
        rng = random.Random(f"{seed}/{split}/{index}")
        scene = sample_scene(rng, split)
        name = f"shapes_{split}_{index:06d}"
        render(scene).save(split_dir / "images" / f"{name}.jpg", quality=95, subsampling=0)
        text = caption(scene, rng.choice(CAPTION_OPENINGS))
        captions.append(_row(name, name, rng.choice(DESCRIBE_PROMPTS), text, image_first=rng.random() < 0.5))
        for number, (question, answer) in enumerate(questions(scene, rng)):
            answers.append(_row(f"{name}-q{number}", name, question, answer, image_first=True))
    _write_json(split_dir / "chat.json", captions)
    _write_json(split_dir / "questions.json", answers)
    counts = Counter(row["conversations"][1]["value"] for row in answers)
    majority_answer, majority_count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "num_images": num_images,
        "num_questions": len(answers),
        "majority_answer": majority_answer,
        "majority_share": majority_count / len(answers),
    }


def _row(row_id: str, image_name: str, prompt: str, answer: str, image_first: bool) -> dict[str, Any]:
    value = f"<image>\n{prompt}" if image_first else f"{prompt}\n<image>"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "image": f"{image_name}.jpg", "conversations": turns}


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
