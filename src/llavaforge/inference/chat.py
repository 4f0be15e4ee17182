"""`llavaforge chat`: one answer with `--prompt`, else a session on the terminal; answers appear as they are made.

Comes in: a model, images by path, lines that are typed. Goes out: answers on stdout, all else on stderr.
"""

import shlex
import sys
from pathlib import Path

import torch

from llavaforge.config.schema import ChatConfig
from llavaforge.errors import UserError
from llavaforge.files import naming
from llavaforge.inference.conversation import Conversation, open_answerer
from llavaforge.report.glyphs import visible

_HELP = "/image FILE shows another image with the next question, /reset forgets all; an empty line ends the session."


def chat(config: ChatConfig) -> None:
    """Answer one prompt, or every line typed until an empty one; answers go to stdout.

    Raises:
        UserError: the model or the image is at fault.
    """
    answerer = open_answerer(
        config.model_name_or_path, config.base_model, config.system_prompt, config.max_new_tokens, config.temperature
    )
    torch.manual_seed(config.seed)
    conversation = Conversation(answerer)
    if config.image is not None:
        _read(conversation, config.image)
    if config.prompt is not None:
        _ask(conversation, config.prompt)
        return
    _session(conversation)


def _read(conversation: Conversation, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such image file. Give the path of a picture.")
    with naming(path):
        content = path.read_bytes()
    conversation.show(content, str(path))


def _ask(conversation: Conversation, prompt: str) -> None:
    """Answer a question on stdout."""
    is_shown = sys.stdout.isatty()
    answer = conversation.ask(prompt, _show if is_shown else None)
    sys.stdout.write("\n" if is_shown else answer + "\n")
    sys.stdout.flush()


def _session(conversation: Conversation) -> None:
    """Keep the conversation going until an empty line or the end of the input; a mistake does not end it."""
    sys.stderr.write(f"Ask. {_HELP}\n")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        try:
            _do(conversation, line)
        except UserError as error:
            sys.stderr.write(f"{error}\n")


def _do(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        try:
            (path,) = shlex.split(rest)
        except ValueError:
            raise UserError(f"/image takes one file, found {rest!r}. Put a name with spaces in quotes.") from None
        _read(conversation, Path(path).expanduser())
    elif command == "/reset":
        conversation.reset()
    elif command.startswith("/") and "/" not in command[1:]:
        raise UserError(f"unknown command {command}. {_HELP}")
    else:
        _ask(conversation, line)


def _show(text: str) -> None:
    sys.stdout.write(visible(text))
    sys.stdout.flush()
