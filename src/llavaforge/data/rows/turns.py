"""One message of a conversation, and the words and signs that data sets use for its parts."""

from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
IMAGE_PLACEHOLDER = "<image>"
LITERAL_PLACEHOLDER = "< image>"  # what a text holds in place of an `<image>` that stands for itself
VIDEO_PLACEHOLDER = "<video>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Role
    text: str


def image_first(text: str) -> str:
    r"""Return a user's text with its only image before its words, `<image>\nWhat?`; with several images as it is.

    Data sets and clients put the image at either end, and a model that saw one order answers the other worse. Chat
    templates of ours do the same (`model_folder/chat_template.py`), as LLaVA's own training did.
    """
    before, found, after = text.partition(IMAGE_PLACEHOLDER)
    if not found or IMAGE_PLACEHOLDER in after:
        return text
    separator = "\n" if before.endswith("\n") or after.startswith("\n") else " "
    words = (before.rstrip() + separator + after.lstrip()).strip()
    return f"{IMAGE_PLACEHOLDER}\n{words}" if words else IMAGE_PLACEHOLDER
