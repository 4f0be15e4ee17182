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
