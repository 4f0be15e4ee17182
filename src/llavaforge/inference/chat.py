"""`llavaforge chat`: one answer with `--prompt`, else a session on the terminal; answers appear as they are made.

Comes in: a model, images by path, lines that are typed. Goes out: answers on stdout, all else on stderr.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llavaforge.answers.generate import Answerer, Question
from llavaforge.checkpoint.trained import open_model
from llavaforge.config.schema import ChatConfig, SampleOptions
from llavaforge.data.pixels.decode import ImageError, decode
from llavaforge.data.pixels.preprocessing import Pixels, Preprocessing
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, Turn, image_first
from llavaforge.device import compute_dtype, pick_device
from llavaforge.errors import UserError, naming
from llavaforge.model.attention import use_packed_attention
from llavaforge.model.trainable import cast_parameters
from llavaforge.report.glyphs import visible

_HELP = "/image FILE shows another image with the next question, /reset forgets all; an empty line ends the session."


def chat(config: ChatConfig) -> None:
    """Answer one prompt, or every line typed until an empty one; answers go to stdout.

    Raises:
        UserError: the model or the image is at fault.
    """
    loaded = open_model(config.model_name_or_path, config.base_model)
    cast_parameters(loaded.model, compute_dtype("auto"))
    loaded.model.to(pick_device()).eval()
    use_packed_attention(loaded.model)
    torch.manual_seed(config.seed)
    options = SampleOptions(system_prompt=config.system_prompt)
    answerer = Answerer(loaded, options, config.max_new_tokens, config.temperature)
    conversation = _Conversation(answerer, loaded.preprocessing)
    if config.image is not None:
        conversation.show(config.image)
    if config.prompt is not None:
        conversation.ask(config.prompt)
        return
    _session(conversation)


@dataclass
class _Conversation:
    """What was said so far, and the images that it is about."""

    answerer: Answerer
    preprocessing: Preprocessing
    turns: list[Turn] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    is_new: bool = False  # the last image belongs to the next question

    def show(self, path: Path) -> None:
        """Read an image for the next question; it takes the place of one that no question was asked about."""
        if not path.is_file():
            raise UserError(f"{path}: no such image file. Give the path of a picture.")
        with naming(path):
            content = path.read_bytes()
        try:
            pixels = self.preprocessing(decode(content, str(path)))
        except ImageError as error:
            raise UserError(str(error).replace(", or remove its record from the data", "")) from None
        del self.pixels[len(self.pixels) - self.is_new :]
        self.pixels.append(pixels)
        self.is_new = True

    def ask(self, prompt: str) -> None:
        """Answer a question on stdout and remember both."""
        if prompt.count(IMAGE_PLACEHOLDER) > self.is_new:
            lacks = "more than one `<image>`" if self.is_new else "`<image>` but there is no new image for it"
            raise UserError(f"the prompt has {lacks}: give one image (--image FILE, or /image FILE) and one `<image>`.")
        if self.is_new and IMAGE_PLACEHOLDER not in prompt:
            prompt = IMAGE_PLACEHOLDER + prompt
        turns = [*self.turns, Turn("user", image_first(prompt))]
        is_shown = sys.stdout.isatty()
        answer = self.answerer([Question(tuple(turns), self.pixels)], _show if is_shown else None)[0]
        sys.stdout.write("\n" if is_shown else answer + "\n")
        sys.stdout.flush()
        self.turns, self.is_new = [*turns, Turn("assistant", answer)], False

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.turns, self.pixels, self.is_new = [], [], False


def _session(conversation: _Conversation) -> None:
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


def _do(conversation: _Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        try:
            (path,) = shlex.split(rest)
        except ValueError:
            raise UserError(f"/image takes one file, found {rest!r}. Put a name with spaces in quotes.") from None
        conversation.show(Path(path).expanduser())
    elif command == "/reset":
        conversation.reset()
    elif command.startswith("/") and "/" not in command[1:]:
        raise UserError(f"unknown command {command}. {_HELP}")
    else:
        conversation.ask(line)


def _show(text: str) -> None:
    sys.stdout.write(visible(text))
    sys.stdout.flush()
