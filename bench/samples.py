"""The samples, generated from a seed: the layout of LLaVA-CC3M-Pretrain-595K with two files of records.

captions.json      one turn, an answer of 12 to 20 tokens, as in LLaVA's stage 1
instructions.json  one to six turns, 50 to 300 tokens of text, as in LLaVA-665K
images/*.jpg       photographs from a given folder, or generated ones of the usual sizes

"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_SAMPLES = 96
# Width and height as they occur in COCO and CC3M.
_IMAGE_SIZES = ((500, 375), (640, 480), (375, 500), (500, 333), (640, 427))
_WORDS_PER_CAPTION = (10, 18)  # with the full stop and the end token: 12 to 20 tokens
_TEXT_TOKENS = (50, 300)
# Tokens of a conversation and of each turn that are neither question nor answer (measured on the tokenizer).
_TOKENS_AROUND, _TOKENS_PER_TURN = 14, 10

Row = dict[str, Any]


def make_samples(folder: Path, photos: Path | None = None, seed: int = 0) -> list[str]:
    """Write images and both files of records below `folder`.

    Args:
        folder: where to.
        photos: a folder of JPEG files to use instead of generated images (searched in depth).
        seed: of words, lengths and images.

    Returns:
        All texts, for the tokenizer.
    """
    names = list(_copy_photos(folder / "images", photos) if photos else _draw_images(folder / "images", seed))
    rng = np.random.default_rng([seed, 1])
    words = _words(rng)
    for name, turns in (("captions", _caption), ("instructions", _conversation)):
        rows = [_row(number, names[number % len(names)], turns(rng, words)) for number in range(NUM_SAMPLES)]
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    rows = [row for name in ("captions", "instructions") for row in json.loads((folder / f"{name}.json").read_text())]
    return [turn["value"] for row in rows for turn in row["conversations"]]


def _row(number: int, image: str, turns: list[tuple[str, str]]) -> Row:
    conversations = []
    for place, (question, answer) in enumerate(turns):
        # CC3M's rows have the image before or after the first question.
        first = f"<image>\n{question}" if number % 2 else f"{question}\n<image>"
        conversations.append({"from": "human", "value": question if place else first})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": f"bench_{number:05}", "image": image, "conversations": conversations}


def _caption(rng: np.random.Generator, words: list[str]) -> list[tuple[str, str]]:
    return [("Describe the image concisely.", _sentence(rng, words, int(rng.integers(*_WORDS_PER_CAPTION))))]


def _conversation(rng: np.random.Generator, words: list[str]) -> list[tuple[str, str]]:
    """Questions of a few words; the answers share what remains of a log-uniform number of tokens."""
    low, high = _TEXT_TOKENS
    total = int(np.exp(rng.uniform(np.log(low), np.log(high))))
    num_turns = int(rng.integers(1, max(2, min(6, total // 35) + 1)))
    left = max(num_turns, total - _TOKENS_AROUND - num_turns * (_TOKENS_PER_TURN + 8))
    shares = rng.dirichlet(np.full(num_turns, 2.0)) * left
    questions = [_sentence(rng, words, 6).replace(" .", " ?") for _ in range(num_turns)]
    return [(q, _sentence(rng, words, max(1, int(n / 1.15)))) for q, n in zip(questions, shares, strict=True)]


def _sentence(rng: np.random.Generator, words: list[str], num_words: int) -> str:
    # Word frequencies fall as 1/rank (Zipf's law), so the tokenizer learns common words whole.
    weights = 1.0 / np.arange(1, len(words) + 1)
    return " ".join(rng.choice(words, size=num_words, p=weights / weights.sum())) + " ."


def _words(rng: np.random.Generator, number: int = 2000) -> list[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    return ["".join(rng.choice(syllables, size=int(rng.integers(1, 4)))) for _ in range(number)]


def _draw_images(folder: Path, seed: int) -> Iterator[str]:
    """Write smooth colour fields with grain: as many bytes per pixel as a photograph has."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, 2])
    for number in range(NUM_SAMPLES):
        width, height = _IMAGE_SIZES[number % len(_IMAGE_SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grainy = smooth + rng.normal(0, 12, smooth.shape)
        name = f"bench_{number:05}.jpg"
        Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)).save(folder / name, quality=88)
        yield name


def _copy_photos(folder: Path, photos: Path) -> Iterator[str]:
    folder.mkdir(parents=True)
    for path in sorted(photos.rglob("*.jpg"))[:NUM_SAMPLES]:
        shutil.copyfile(path, folder / path.name)
        yield path.name
