"""What can be wrong with a record or an image: every kind, once.

A fault is found when data is prepared (`data/index/prepare.py`), when all images are decoded (`data_check/findings.py`)
or when a training step reads an image (`data/load/loader.py`). One fault:

    {"kind": "empty_answer", "file": "chat.json", "row": 17, "id": "000017", "message": "the answer in turn 1 is empty.
    Give it a text or remove the row."}
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """One kind of fault: whether training refuses it, and what to do about it."""

    severity: Literal["error", "warning"]
    title: str
    remedy: str


KINDS: dict[str, Kind] = {
    "malformed_json": Kind("error", "malformed JSON", "Mend the line; a cut-off download ends in the middle of one."),
    "malformed_row": Kind("error", "not a conversation", "Give the row the fields of a known format, or remove it."),
    "unknown_role": Kind("error", "unknown role", "Rename the role, or remove the row."),
    "turn_order": Kind("error", "broken turn order", "Turns alternate user, assistant and end with assistant."),
    "empty_answer": Kind("error", "empty answer", "Write the answer, or remove the row."),
    "image_count": Kind("error", "placeholders do not match images", "One `<image>` per image, in their order."),
    "video": Kind("error", "a video", "Remove the row: no videos are read, and it would be learnt without its clip."),
    "unread_image": Kind("error", "image in a field that is not read", "Rename the field, or map it with `columns`."),
    "remote_image": Kind("error", "image is a URL", "Download the image; data is read from files only."),
    "unsafe_path": Kind("error", "image outside its folder", "Put the image below the image folder."),
    "missing_image": Kind("error", "missing image", "Add the file, or remove the row."),
    "not_an_image": Kind("error", "not an image", "Download the file again, or remove the row."),
    "truncated_image": Kind("error", "truncated or corrupt image", "Download the file again, or remove the row."),
    "image_too_large": Kind("error", "image too large", "Scale the image down, or remove the row."),
    "no_supervised_tokens": Kind("error", "nothing to learn", "The answer has no tokens: write it, or remove the row."),
    "unprovable_labels": Kind("error", "labels cannot be proved", "Remove special markers, or use another template."),
    "too_long": Kind("error", "does not fit max_length", "Raise max_length, or remove the row."),
    "leak": Kind("error", "held-out data is trained on", "Quarantine these rows, or hold out others."),
    "shortened": Kind("warning", "cut to max_length", "Raise max_length if the end matters."),
    "special_tokens": Kind("warning", "special tokens in a text", "See special_tokens_in_text: split (text) or keep."),
    "cut_boxes": Kind("warning", "boxes in an image that is cropped", "Join the model with --image_aspect_ratio pad."),
    "nothing_to_see": Kind("warning", "an image in which nothing can be seen", "Look at the file: scale its values."),
    "literal_placeholder": Kind("warning", "literal `<image>` in a text", "It is kept as text, not as an image."),
    "duplicate": Kind("warning", "exact duplicate", "Remove all but one, unless the repetition is meant."),
    "repeated_image": Kind("warning", "image with several captions", "Fine if meant; hold out by image, not by row."),
}


class RecordError(ValueError):
    """A fault of one record.

    Attributes:
        kind: a key of `KINDS`.
        path: the image at fault, or an empty text.
    """

    def __init__(self, kind: str, message: str, path: str = "") -> None:
        super().__init__(message)
        assert kind in KINDS, kind
        self.kind, self.path = kind, path


@dataclass(frozen=True)
class Fault:
    """A fault and the record that has it.

    Attributes:
        kind: a key of `KINDS`.
        file: name of the data file.
        row: number of the row (from 0) or of the line (from 1).
        id: the record's own id, or an empty text.
        message: what, and what to do.
        path: the image at fault, or an empty text.
    """

    kind: str
    file: str
    row: int
    id: str
    message: str
    path: str = ""

    @property
    def where(self) -> str:
        """What messages call the record."""
        return describe_record(self.file, self.row, self.id)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def describe_record(file: str, row: int, id_: str = "") -> str:
    """Return what messages call a record: `rows.jsonl:17 (id 'a')`, or `chat.json row 16 (id 'a')`."""
    counts_lines = ".jsonl" in file or ".ndjson" in file
    name = f"{file}:{row}" if counts_lines else f"{file} row {row}"
    return f"{name} (id {id_!r})" if id_ else name
