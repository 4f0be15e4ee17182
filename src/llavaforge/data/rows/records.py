r"""Raw rows of a data set, in any of the known formats, as records: pure parsing, no model, no pixels, no files.

Comes in: one row, as JSON, Parquet, Arrow or a tar gave it (`data/rows/readers.py`). Goes out: a `Record`.

LLaVA and ShareGPT (`from`/`value`, `<image>` in the text):

    {"id": "GCC_train_002582585", "image": "GCC_train_002582585.jpg",
     "conversations": [{"from": "human", "value": "Describe the image.\n<image>"},
                       {"from": "gpt", "value": "olive oil is a healthy ingredient used liberally ."}]}

Messages, as OpenAI writes them (a content part per image, or `<image>` in a text and a list `images`):

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cat."}]}

Captions (an image and a text, as WebDataset and caption collections have them):

    {"image": "a.jpg", "caption": "a cat"}

Questions and answers, or prompts and completions; and lists of them (the_cauldron, FineVision):

    {"image": "a.jpg", "question": "What is it?", "answer": "a cat"}
    {"image": "a.jpg", "question": "What is it?", "answers": ["cat", "a cat", "kitten"]}
    {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "a cat", "source": "VQAv2"}]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavaforge.data.faults import RecordError
from llavaforge.data.rows.formats import FORMATS, answers_of, check_all_read, detect_format
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn, image_first
from llavaforge.data.storage.image_ref import ImageRef, short


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        id: its own id, or an empty text.
        images: in the order of their placeholders.
        turns: user first, after a system turn if any; a user's only image stands before the words.
        num_literals: `<image>` in texts that stand for themselves and were escaped.
        answers: what several people answered to the last question, if the row says it (`answers`).
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    num_literals: int = 0
    answers: tuple[str, ...] = ()


def parse_record(row: Any, format_: str = "auto", columns: Mapping[str, str] | None = None) -> Record:
    """Turn one raw row into a `Record`.

    Args:
        row: what the reader gave.
        format_: a key of `FORMATS`, or `auto`.
        columns: by the names of ours the row's own, where they differ.

    Raises:
        RecordError: says the fault and what is allowed.
    """
    if not isinstance(row, dict):
        raise RecordError("malformed_row", f"a row is an object with `conversations`, found {type(row).__name__}.")
    if columns:
        row = _renamed(row, columns)
    parse = FORMATS[detect_format(row) if format_ == "auto" else format_]
    images, turns, num_literals = parse(row)
    check_all_read(row, images)
    turns = _system_first([Turn(turn.role, turn.text.strip()) for turn in turns])
    _check_text(turns, images)
    _check_order(turns)
    _check_placeholders(turns, images)
    num_literals += sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role != "user")
    turns = tuple(Turn(turn.role, image_first(turn.text)) if turn.role == "user" else turn for turn in turns)
    return Record(id_of(row), tuple(images), turns, num_literals, answers_of(row))


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with the fields of `columns` under our names.

    Raises:
        RecordError: it lacks one of them.
    """
    if missing := sorted(set(columns.values()) - row.keys()):
        found = short(", ".join(sorted(map(str, row))), 300)
        raise RecordError("malformed_row", f"the row has no field `{missing[0]}` (`columns`); found {found}.")
    kept = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _system_first(turns: list[Turn]) -> tuple[Turn, ...]:
    """Return turns with a system text that stands last in its place: some tools append it."""
    if len(turns) > 1 and turns[-1].role == "system" and all(turn.role != "system" for turn in turns[:-1]):
        turns = [turns[-1], *turns[:-1]]
    return tuple(turns)


def id_of(row: Any) -> str:
    """Return a row's own id, or an empty text."""
    value = row.get("id", row.get("__key__")) if isinstance(row, dict) else None
    if value is None or isinstance(value, (dict, list)):
        return ""
    return str(value).encode("utf-8", "replace").decode()


def _check_text(turns: Sequence[Turn], images: Sequence[ImageRef]) -> None:
    for text in (*(turn.text for turn in turns), *(image.name for image in images)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                "malformed_row",
                f"a text holds half of a character ({text[error.start]!r}), which UTF-8 cannot write. Write the whole "
                "surrogate pair, or remove the row.",
            ) from None


def _check_order(turns: Sequence[Turn]) -> None:
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise RecordError("turn_order", "a system turn may only come first.")
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RecordError("turn_order", f"turns must alternate human, gpt and end with gpt, found {spoken}.")
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text:
            raise RecordError(
                "empty_answer", f"the answer in turn {number} is empty. Give it a text or remove the row."
            )


def _check_placeholders(turns: Sequence[Turn], images: Sequence[ImageRef]) -> None:
    if any(VIDEO_PLACEHOLDER in turn.text for turn in turns if turn.role == "user"):
        raise RecordError("video", "a question holds `<video>`, and no video is read: its answer is about a clip.")
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders == len(images):
        return
    if not images:
        raise RecordError(
            "image_count",
            f"{placeholders} `<image>` but no `image`. Add the image's file name or remove the placeholder.",
        )
    names = ", ".join(repr(short(image.name)) for image in images[:3])
    raise RecordError(
        "image_count",
        f"{len(images)} image(s) ({names}) need exactly one `<image>` each in the human's text, found {placeholders}.",
    )
