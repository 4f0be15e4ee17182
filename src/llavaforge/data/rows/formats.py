"""The formats of rows: one table, from a format's name to how its images and turns are read.

Comes in: a row's fields. Goes out: images and turns, as they stand there (`data/rows/records.py` checks them).
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llavaforge.data.faults import RecordError
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, LITERAL_PLACEHOLDER, ROLES, Role, Turn
from llavaforge.data.storage.image_ref import IMAGE_KEYS, ImageRef, short

# A caption has no question. This one is of the list in LLaVA's paper (Liu et al., 2023, table 11).
CAPTION_PROMPT = "Provide a brief description of the given image."
CAPTION_KEYS = ("caption", "text", "txt")
QUESTION_KEYS = (("question", "answer"), ("prompt", "completion"))
VIDEO_KEYS = ("video", "videos")
FIELDS = (
    "id", "__key__", "conversations", "messages", "texts", "system",
    *(key for pair in QUESTION_KEYS for key in pair), "answers", *IMAGE_KEYS, *CAPTION_KEYS, *VIDEO_KEYS,
)  # fmt: skip
"""All fields of a row that are looked at."""

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# How base64 of a JPEG, PNG, GIF, WebP and TIFF begins: their first bytes are always the same.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_LONGEST_NAME = 4096  # PATH_MAX of Linux
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def detect_format(row: Mapping[str, Any]) -> str:
    """Return the format that a row's fields tell.

    Raises:
        RecordError: they tell none.
    """
    for key, format_ in (("conversations", "llava"), ("messages", "messages"), ("texts", "texts")):
        if row.get(key) is not None:
            return format_
    if any(all(row.get(key) is not None for key in pair) for pair in QUESTION_KEYS):
        return "question"
    if row.get("question") is not None and answers_of(row):
        return "question"
    if any(row.get(key) is not None for key in CAPTION_KEYS):
        return "caption"
    raise RecordError(
        "malformed_row",
        "a row needs `conversations`, `messages`, `texts`, `question` and `answer`, `prompt` and `completion`, or "
        f"`caption`; found the fields {short(', '.join(sorted(map(str, row))), 300)}. Other names are given in a data "
        "entry: `columns: {image: ..., question: ..., answer: ...}`.",
    )


_Parsed = tuple[list[ImageRef], Sequence[Turn], int]


def _parse_llava(row: dict[str, Any]) -> _Parsed:
    conversations = row.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("malformed_row", "`conversations` must be a non-empty list of {from, value}.")
    turns = [_parse_turn(turn) for turn in conversations]
    return _images_of(row), [*_system_of(row), *turns], 0


def _parse_turn(turn: Any) -> Turn:
    role, text = (_first(turn, keys) for keys in (("from", "role"), ("value", "content")))
    if role is None or not isinstance(text, str):
        raise RecordError(
            "malformed_row", f"each turn is an object with `from` and a text `value`, found {turn!r:.80}."
        )
    return Turn(_role(role), text)


def _first(turn: Any, keys: Sequence[str]) -> Any:
    """Return the first field that is filled: a merged table has all of them, and nulls."""
    values = (turn.get(key) for key in keys) if isinstance(turn, dict) else ()
    return next((value for value in values if value is not None), None)


def _parse_messages(row: dict[str, Any]) -> _Parsed:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RecordError("malformed_row", "`messages` must be a non-empty list of {role, content}.")
    beside, num_literals = _images_of(row), 0
    images: list[ImageRef] = []
    turns: list[Turn] = []
    for message in messages:
        role, content = (_first(message, keys) for keys in (("role", "from"), ("content", "value")))
        if role is None:
            raise RecordError("malformed_row", f"each message has `role` and `content`, found {message!r:.80}.")
        role = _role(role)
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
    if all(turn.role != "system" for turn in turns):
        turns = [*_system_of(row), *turns]
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
    caption = _first(row, CAPTION_KEYS)
    if not isinstance(caption, str):
        raise RecordError("malformed_row", f"`caption` must be a text, found {caption!r:.80}.")
    images = _images_of(row)
    if len(images) != 1:
        raise RecordError("image_count", f"a caption belongs to one image, found {len(images)}.")
    return images, [Turn("user", f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPT}"), Turn("assistant", caption)], 0


def _parse_question(row: dict[str, Any]) -> _Parsed:
    """Read columns of questions and answers (VQA: the commonest of several), or prompts and completions (TRL)."""
    names = next((pair for pair in QUESTION_KEYS if row.get(pair[0]) is not None), QUESTION_KEYS[0])
    question, answer = (row.get(name) for name in names)
    if answer is None and (several := answers_of(row)):
        answer = Counter(several).most_common(1)[0][0]
    if isinstance(question, list) and isinstance(answer, list):  # TRL's conversational form
        images, turns, num_literals = _parse_messages({**row, "messages": [*question, *answer]})
        return images, _images_first(turns, images), num_literals
    return _from_pairs(row, [(question, answer)], names)


def _parse_texts(row: dict[str, Any]) -> _Parsed:
    """Read `texts` of the_cauldron and FineVision: a list of {user, assistant, source}."""
    texts = row.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, dict) for text in texts):
        raise RecordError("malformed_row", "`texts` must be a non-empty list of {user, assistant}.")
    return _from_pairs(row, [(text.get("user"), text.get("assistant")) for text in texts], ("user", "assistant"))


def _from_pairs(row: dict[str, Any], pairs: Sequence[tuple[Any, Any]], names: Sequence[str]) -> _Parsed:
    images = _images_of(row)
    turns = []
    for pair in pairs:
        for role, text, name in zip(("user", "assistant"), pair, names, strict=True):
            if isinstance(text, int | float) and not isinstance(text, bool):  # an answer that is a number
                text = str(text)
            if not isinstance(text, str):
                raise RecordError("malformed_row", f"`{name}` must be a text, found {text!r:.80}.")
            turns.append(Turn(_role(role), text))
    return images, _images_first([*_system_of(row), *turns], images), 0


def _images_first(turns: Sequence[Turn], images: Sequence[ImageRef]) -> list[Turn]:
    """Put the placeholders before the first question where the texts hold none: these formats imply them."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role == "user"):
        return list(turns)
    question = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[first].text)
    return [*turns[:first], question, *turns[first + 1 :]]


FORMATS: dict[str, Callable[[dict[str, Any]], _Parsed]] = {
    "llava": _parse_llava,
    "sharegpt": _parse_llava,
    "messages": _parse_messages,
    "caption": _parse_caption,
    "question": _parse_question,
    "texts": _parse_texts,
}


def answers_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what several people answered, if a row says it: `answers`, texts or objects with an `answer` (VQAv2)."""
    values = row.get("answers")
    texts = [one.get("answer") if isinstance(one, dict) else one for one in values] if isinstance(values, list) else []
    return tuple(text for text in texts if isinstance(text, str) and text.strip())


def _system_of(row: Mapping[str, Any]) -> list[Turn]:
    """Return the system text that stands beside the turns (ShareGPT keeps it there), if there is one."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RecordError("malformed_row", f"`system` must be a text, found {system!r:.80}.")
    return [Turn("system", system)] if system and system.strip() else []


def _images_of(row: Mapping[str, Any]) -> list[ImageRef]:
    found: dict[str, list[ImageRef]] = {}
    for key in IMAGE_KEYS:
        values = row[key] if isinstance(row.get(key), list) else [row.get(key)]
        if not all(is_null(value) for value in values):
            found[key] = [_image(value) for value in values]
    (first, images), *others = found.items() or [("", [])]
    if different := next((key for key, mine in others if mine != images), None):
        raise RecordError(
            "malformed_row",
            f"`{first}` and `{different}` name other images ({short(images[0].name)!r}, "
            f"{short(found[different][0].name)!r}), and one of them would not be seen. Leave one.",
        )
    return images


def is_null(value: Any) -> bool:
    """Say whether a field holds nothing: null, or a struct of nulls, as a merged table has them."""
    return value is None or (isinstance(value, dict) and all(item is None for item in value.values()))


def check_all_read(row: Mapping[str, Any], images: Sequence[ImageRef]) -> None:
    """Check that nothing that the answers are about is left out in silence.

    Raises:
        RecordError: the row has a video, or names an image by a field that is not read.
    """
    for key in VIDEO_KEYS:
        if not is_null(row.get(key)) and row[key] != []:
            raise RecordError("video", f"the row has a `{key}`, which is not read: its answers are about a clip.")
    if images:
        return
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        if key not in FIELDS and isinstance(first, str) and _names_image(first):
            raise RecordError(
                "unread_image",
                f"the field `{key}` names an image, {short(first)!r}, and is not read. Call it `image`, or map it in "
                f"the data entry: `columns: {{image: {key}}}`.",
            )


def _names_image(text: str) -> bool:
    return len(text) <= _LONGEST_NAME and "\n" not in text and text.lower().endswith(_SUFFIXES)


def _image(value: Any) -> ImageRef:
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        value = value["path"]
    if not isinstance(value, str) or not value.strip():
        raise RecordError("malformed_row", f"an image is a file name, found {value!r:.80}.")
    if value.startswith("data:"):
        return ImageRef("".join(value.split()))
    if value.lstrip().startswith(_BASE64) and (len(value) > _LONGEST_NAME or "." not in value):
        return ImageRef("data:;base64," + "".join(value.split()))
    if value.lower().startswith("file://"):
        value = value[len("file://") :]
    if _URL.match(value):
        raise RecordError("remote_image", f"image {value!r:.80} is not a file. Download it and name the file.")
    if len(value) > _LONGEST_NAME:
        raise RecordError("malformed_row", f"an image is a file name or base64 of an image file, found {value!r:.80}.")
    return ImageRef(value)


def _role(value: Any) -> Role:
    if not isinstance(value, str) or value not in ROLES:
        raise RecordError("unknown_role", f"unknown role {value!r:.80}. Allowed: {', '.join(ROLES)}.")
    return ROLES[value]
