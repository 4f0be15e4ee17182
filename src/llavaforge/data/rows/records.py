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
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llavaforge.data.faults import RecordError
from llavaforge.data.storage.image_ref import IMAGE_KEYS, ImageRef

Role = Literal["system", "user", "assistant"]
IMAGE_PLACEHOLDER = "<image>"
LITERAL_PLACEHOLDER = "< image>"  # what a text holds in place of an `<image>` that stands for itself
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# A caption has no question. This one is of the list in LLaVA's paper (Liu et al., 2023, table 11).
CAPTION_PROMPT = "Provide a brief description of the given image."

_CAPTION_KEYS = ("caption", "text", "txt")
FIELDS = ("id", "__key__", "conversations", "messages", "system", *IMAGE_KEYS, *_CAPTION_KEYS)
"""All fields of a row that are looked at."""
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        id: its own id, or an empty text.
        images: in the order of their placeholders.
        turns: user first, after a system turn if any.
        num_literals: `<image>` in texts that stand for themselves and were escaped.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    num_literals: int = 0


def parse_record(row: Any, format_: str = "auto") -> Record:
    """Turn one raw row into a `Record`.

    Args:
        row: what the reader gave.
        format_: a key of `FORMATS`, or `auto`.

    Raises:
        RecordError: says the fault and what is allowed.
    """
    if not isinstance(row, dict):
        raise RecordError("malformed_row", f"a row is an object with `conversations`, found {type(row).__name__}.")
    parse = FORMATS[detect_format(row) if format_ == "auto" else format_]
    images, turns, num_literals = parse(row)
    turns = tuple(Turn(turn.role, turn.text.strip()) for turn in turns)
    _check_text(turns, images)
    _check_order(turns)
    _check_placeholders(turns, images)
    num_literals += sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role != "user")
    return Record(id=id_of(row), images=tuple(images), turns=turns, num_literals=num_literals)


def id_of(row: Any) -> str:
    """Return a row's own id, or an empty text."""
    value = row.get("id", row.get("__key__")) if isinstance(row, dict) else None
    if value is None or isinstance(value, (dict, list)):
        return ""
    return str(value).encode("utf-8", "replace").decode()


def detect_format(row: dict[str, Any]) -> str:
    """Return the format that a row's fields tell.

    Raises:
        RecordError: they tell none.
    """
    if row.get("conversations") is not None:
        return "llava"
    if row.get("messages") is not None:
        return "messages"
    if any(row.get(key) is not None for key in _CAPTION_KEYS):
        return "caption"
    raise RecordError(
        "malformed_row",
        f"a row needs `conversations`, `messages` or `caption`, found the fields {sorted(map(str, row))}.",
    )


_Parsed = tuple[list[ImageRef], Sequence[Turn], int]


def _parse_llava(row: dict[str, Any]) -> _Parsed:
    conversations = row.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("malformed_row", "`conversations` must be a non-empty list of {from, value}.")
    turns = [_parse_turn(turn) for turn in conversations]
    system = row.get("system")  # ShareGPT keeps it beside the conversation
    if isinstance(system, str) and system.strip():
        turns.insert(0, Turn("system", system))
    return _images_of(row), turns, 0


def _parse_turn(turn: Any) -> Turn:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if role is None or not isinstance(text, str):
        raise RecordError(
            "malformed_row", f"each turn is an object with `from` and a text `value`, found {turn!r:.80}."
        )
    return Turn(_role(role), text)


def _parse_messages(row: dict[str, Any]) -> _Parsed:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RecordError("malformed_row", "`messages` must be a non-empty list of {role, content}.")
    beside, num_literals = _images_of(row), 0
    images: list[ImageRef] = []
    turns: list[Turn] = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise RecordError("malformed_row", f"each message has `role` and `content`, found {message!r:.80}.")
        role, content = _role(message["role"]), message.get("content")
        if isinstance(content, str):
            turns.append(Turn(role, content))
            if role == "user":
                num = content.count(IMAGE_PLACEHOLDER)
                images, beside = images + beside[:num], beside[num:]
        elif isinstance(content, list):
            text, mine, beside, literals = _join_parts(content, role, beside)
            turns.append(Turn(role, text))
            images, num_literals = images + mine, num_literals + literals
        else:
            raise RecordError("malformed_row", f"`content` is a text or a list of parts, found {content!r:.80}.")
    return images + beside, turns, num_literals


def _join_parts(
    parts: list[Any], role: Role, beside: list[ImageRef]
) -> tuple[str, list[ImageRef], list[ImageRef], int]:
    """Write content parts as one text, a line each.

    Returns:
        The text, its images, what is left of `beside`, and the number of literal placeholders that were escaped.
    """
    lines: list[str] = []
    images: list[ImageRef] = []
    num_literals = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            num_literals += part["text"].count(IMAGE_PLACEHOLDER)
            lines.append(part["text"].replace(IMAGE_PLACEHOLDER, LITERAL_PLACEHOLDER).strip("\n"))
        elif kind in ("image", "image_url") and role == "user":
            lines.append(IMAGE_PLACEHOLDER)
            value = part.get(kind) if part.get(kind) is not None else part.get("path", part.get("url"))
            if value is None:  # the parts only mark the places of `images`
                if not beside:
                    raise RecordError("image_count", "an image part names no image and `images` holds no more.")
                value, beside = beside[0], beside[1:]
            images.append(_image(value.get("url") if kind == "image_url" and isinstance(value, dict) else value))
        else:
            raise RecordError(
                "malformed_row",
                f"a content part is a text, or an image of a user, found {part!r:.80} of {role}.",
            )
    return "\n".join(lines), images, beside, num_literals


def _parse_caption(row: dict[str, Any]) -> _Parsed:
    caption = next((row[key] for key in _CAPTION_KEYS if row.get(key) is not None), None)
    if not isinstance(caption, str):
        raise RecordError("malformed_row", f"`caption` must be a text, found {caption!r:.80}.")
    images = _images_of(row)
    if len(images) != 1:
        raise RecordError("image_count", f"a caption belongs to one image, found {len(images)}.")
    return images, [Turn("user", f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPT}"), Turn("assistant", caption)], 0


FORMATS: dict[str, Callable[[dict[str, Any]], _Parsed]] = {
    "llava": _parse_llava,
    "sharegpt": _parse_llava,
    "messages": _parse_messages,
    "caption": _parse_caption,
}


def _images_of(row: dict[str, Any]) -> list[ImageRef]:
    key = next((key for key in IMAGE_KEYS if row.get(key) is not None), None)
    if key is None:
        return []
    value = row[key]
    values = value if isinstance(value, list) else [value]
    return [_image(item) for item in values]


def _image(value: Any) -> ImageRef:
    if isinstance(value, ImageRef):
        return value
    if not isinstance(value, str) or not value.strip():
        raise RecordError("malformed_row", f"an image is a file name, found {value!r:.80}.")
    if value.lower().startswith("file://"):
        value = value[len("file://") :]
    if _URL.match(value):
        raise RecordError("remote_image", f"image {value!r:.80} is not a file. Download it and name the file.")
    return ImageRef(value)


def _role(value: Any) -> Role:
    if not isinstance(value, str) or value not in ROLES:
        raise RecordError("unknown_role", f"unknown role {value!r:.80}. Allowed: {', '.join(ROLES)}.")
    return ROLES[value]


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
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders == len(images):
        return
    if not images:
        raise RecordError(
            "image_count",
            f"{placeholders} `<image>` but no `image`. Add the image's file name or remove the placeholder.",
        )
    names = ", ".join(repr(image.name) for image in images[:3])
    raise RecordError(
        "image_count",
        f"{len(images)} image(s) ({names}) need exactly one `<image>` each in the human's text, found {placeholders}.",
    )
