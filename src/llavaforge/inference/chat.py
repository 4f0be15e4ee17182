"""`llavaforge chat`: one answer with `--prompt`, else a session on the terminal."""

import sys
from collections.abc import Sequence

import torch

from llavaforge.checkpoint.trained import open_model
from llavaforge.config.schema import ChatConfig, SampleOptions
from llavaforge.data.pixels.decode import decode
from llavaforge.data.pixels.preprocessing import Pixels
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, Turn, image_first
from llavaforge.device import compute_dtype, pick_device
from llavaforge.errors import UserError
from llavaforge.inference.generate import Answerer, Question
from llavaforge.model.attention import use_packed_attention
from llavaforge.model.trainable import cast_parameters
from llavaforge.report.glyphs import visible


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
    pixels: list[Pixels] = []
    if config.image is not None:
        if not config.image.is_file():
            raise UserError(f"{config.image}: no such image file (--image).")
        pixels.append(loaded.preprocessing(decode(config.image.read_bytes(), str(config.image))))
    options = SampleOptions(system_prompt=config.system_prompt)
    answerer = Answerer(loaded, options, config.max_new_tokens, config.temperature)
    if config.prompt is not None:
        _say(answerer([Question((_first_turn(config.prompt, pixels),), pixels)])[0])
        return
    _session(answerer, pixels)


def _session(answerer: Answerer, pixels: Sequence[Pixels]) -> None:
    """Keep the conversation going until an empty line or the end of the input."""
    turns: list[Turn] = []
    sys.stderr.write("Ask; an empty line ends the session.\n")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        turns.append(Turn("user", line) if turns else _first_turn(line, pixels))
        answer = answerer([Question(tuple(turns), pixels)])[0]
        turns.append(Turn("assistant", answer))
        _say(answer)


def _first_turn(prompt: str, pixels: Sequence[Pixels]) -> Turn:
    """Put the image before the first prompt, as in training."""
    if not pixels and IMAGE_PLACEHOLDER in prompt:
        raise UserError("the prompt has `<image>` but there is no image: give --image FILE.")
    if prompt.count(IMAGE_PLACEHOLDER) > 1:
        raise UserError("the prompt has more than one `<image>`, and --image is one: leave one of them.")
    if pixels and IMAGE_PLACEHOLDER not in prompt:
        prompt = IMAGE_PLACEHOLDER + prompt
    return Turn("user", image_first(prompt))


def _say(answer: str) -> None:
    sys.stdout.write((visible(answer) if sys.stdout.isatty() else answer) + "\n")
    sys.stdout.flush()
