r"""Raw rows of a LLaVA-style data set: pure parsing, no model, no pixels.

Comes in: a folder with `chat.json`, or a .json / .jsonl file. Goes out: a list of `Record`. Called by `data/index.py`.

One row, as in LLaVA-CC3M-Pretrain-595K:

    {"id": "GCC_train_002582585", "image": "GCC_train_002582585.jpg",
     "conversations": [{"from": "human", "value": "Describe the image.\n<image>"},
                       {"from": "gpt", "value": "olive oil is a healthy ingredient used liberally ."}]}
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavaforge.errors import UserError

IMAGE_PLACEHOLDER = "<image>"
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_DATA_FILES = ("chat.json", "chat.jsonl")
_MOST_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Record:
    """One row: its place in the file (`where`), its image if any, and its turns, user first."""

    where: str
    id: str
    image: str | None
    turns: tuple[Turn, ...]


class RecordError(ValueError):
    """A fault of one record; collected by `read_records` and by `data/index.py`."""


def find_data_file(data_path: Path) -> Path:
    """Return the JSON or JSONL file that `data_path` stands for.

    Raises:
        UserError: nothing usable is there.
    """
    if data_path.is_file():
        return data_path
    for name in _DATA_FILES:
        if (data_path / name).is_file():
            return data_path / name
    if data_path.is_dir():
        raise UserError(
            f"{data_path}: no chat.json in this folder. "
            "Name the .json or .jsonl file itself, or take the layout of LLaVA-CC3M-Pretrain-595K: chat.json, images/."
        )
    raise UserError(f"{data_path}: no such file or folder (data_path).")


def read_records(data_file: Path) -> list[Record]:
    """Read and check every row.

    Raises:
        UserError: malformed JSON, or faulty rows (all are counted, the first ones shown, each with file, row and
        remedy).
    """
    records: list[Record] = []
    faults: list[str] = []
    for where, row in _rows(data_file):
        try:
            records.append(parse_record(row, where))
        except RecordError as error:
            faults.append(str(error))
    raise_faults(faults, len(records) + len(faults), data_file)
    if not records:
        raise UserError(f"{data_file}: no rows. A data set needs at least one record with `conversations`.")
    return records


def raise_faults(faults: list[str], num_records: int, data_file: Path) -> None:
    """Raise one UserError for all faulty records, if there are any."""
    if not faults:
        return
    shown = "\n".join(f"  {fault}" for fault in faults[:_MOST_FAULTS_SHOWN])
    more = f"\n  ... and {len(faults) - _MOST_FAULTS_SHOWN} more" if len(faults) > _MOST_FAULTS_SHOWN else ""
    raise UserError(f"{data_file}: {len(faults)} of {num_records} records are faulty:\n{shown}{more}")


def parse_record(row: Any, where: str) -> Record:
    """Turn one raw row into a `Record`.

    Args:
        row: what JSON gave.
        where: file and row, for messages.

    Raises:
        RecordError: names the place, the fault, what is allowed.
    """
    if not isinstance(row, dict):
        raise RecordError(f"{where}: a row is an object with `conversations`, found {type(row).__name__}.")
    name = str(row.get("id", ""))
    where = f"{where} (id {name!r})" if name else where
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise RecordError(f"{where}: `image` is one file name, found {image!r}. One image per record is supported.")
    conversations = row.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise RecordError(f"{where}: `conversations` must be a non-empty list of {{from, value}}.")
    turns = tuple(_parse_turn(turn, where) for turn in conversations)
    _check_turns(turns, image, where)
    return Record(where=where, id=name, image=image, turns=turns)


def _parse_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or "from" not in turn or not isinstance(turn.get("value"), str):
        raise RecordError(f"{where}: each turn is an object with `from` and a text `value`, found {turn!r:.80}.")
    if turn["from"] not in ROLES:
        raise RecordError(f"{where}: unknown role {turn['from']!r}. Allowed: {', '.join(ROLES)}.")
    return Turn(ROLES[turn["from"]], turn["value"].strip())


def _check_turns(turns: tuple[Turn, ...], image: str | None, where: str) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise RecordError(f"{where}: a system turn may only come first.")
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or [turn.role for turn in spoken] != expected:
        raise RecordError(
            f"{where}: turns must alternate human, gpt and end with gpt, found {[turn.role for turn in spoken]}."
        )
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text:
            raise RecordError(f"{where}: the answer in turn {number} is empty. Give it a text or remove the row.")
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if image is None and placeholders:
        raise RecordError(
            f"{where}: {placeholders} `<image>` but no `image`. Add the image's file name or remove the placeholder."
        )
    if image is not None and placeholders != 1:
        raise RecordError(
            f"{where}: image {image!r} needs exactly one `<image>` in the human's text, found {placeholders}."
        )


def _rows(data_file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = data_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{data_file}: not UTF-8 text ({error}). Save the file as UTF-8.") from None
    if data_file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{data_file.name}:{number}", _parse_json(line, data_file, number)
        return
    rows = _parse_json(text, data_file)
    if not isinstance(rows, list):
        raise UserError(f"{data_file}: expected a JSON list of rows, found {type(rows).__name__}.")
    for number, row in enumerate(rows):
        yield f"{data_file.name} row {number}", row


def _parse_json(text: str, data_file: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = line or error.lineno
        raise UserError(
            f"{data_file}:{place}:{error.colno}: malformed JSON: {error.msg}. "
            "Mend that place (a cut-off download ends in the middle of a row)."
        ) from None
