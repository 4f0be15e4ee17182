"""A conversation with a model: what was said so far, and the images that it is about.

Comes in: a model's name, image files, questions. Goes out: answers, piece by piece where asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llavaforge.answers.generate import Answerer, Question
from llavaforge.checkpoint.trained import open_model
from llavaforge.config.schema import SampleOptions
from llavaforge.data.pixels.decode import ImageError, decode
from llavaforge.data.pixels.preprocessing import Pixels
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, Turn, image_first
from llavaforge.device import compute_dtype, pick_device
from llavaforge.errors import UserError
from llavaforge.model.attention import use_packed_attention
from llavaforge.model.trainable import cast_parameters


def open_answerer(
    name_or_path: str, base_model: Path | None, system_prompt: str | None, max_new_tokens: int, temperature: float
) -> Answerer:
    """Open a model on its device, ready to answer.

    Args:
        name_or_path: a model folder, a run's `final`, or a checkpoint-N.
        base_model: of a run whose base model moved.
        system_prompt: system message of every conversation.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.

    Raises:
        UserError: see `open_model`.
    """
    loaded = open_model(name_or_path, base_model)
    cast_parameters(loaded.model, compute_dtype("auto"))
    loaded.model.to(pick_device()).eval()
    use_packed_attention(loaded.model)
    return Answerer(loaded, SampleOptions(system_prompt=system_prompt), max_new_tokens, temperature)


@dataclass
class Conversation:
    """What was said so far, and the images that it is about."""

    answerer: Answerer
    turns: list[Turn] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    is_new: bool = False  # the last image belongs to the next question

    def show(self, content: bytes, name: str) -> None:
        """Take an image file for the next question, in the place of one that no question was asked about.

        Raises:
            UserError: it is no image that can be decoded.
        """
        try:
            pixels = self.answerer.preprocessing(decode(content, name))
        except ImageError as error:
            raise UserError(str(error).replace(", or remove its record from the data", "")) from None
        del self.pixels[len(self.pixels) - self.is_new :]
        self.pixels.append(pixels)
        self.is_new = True

    def ask(
        self,
        prompt: str,
        on_text: Callable[[str], None] | None = None,
        is_stopped: Callable[[], bool] | None = None,
    ) -> str:
        """Answer a question and remember both.

        Args:
            prompt: may have `<image>` where a new image belongs.
            on_text: told each piece of the answer.
            is_stopped: asked after each token whether the answer is long enough.

        Raises:
            UserError: there is no new image for an `<image>`.
        """
        if prompt.count(IMAGE_PLACEHOLDER) > self.is_new:
            lacks = "more than one `<image>`" if self.is_new else "`<image>` but there is no new image for it"
            raise UserError(f"the prompt has {lacks}: give one image (--image FILE, or /image FILE) and one `<image>`.")
        if self.is_new and IMAGE_PLACEHOLDER not in prompt:
            prompt = IMAGE_PLACEHOLDER + prompt
        turns = [*self.turns, Turn("user", image_first(prompt))]
        answer = self.answerer([Question(tuple(turns), self.pixels)], on_text, is_stopped)[0]
        self.turns, self.is_new = [*turns, Turn("assistant", answer)], False
        return answer

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.turns, self.pixels, self.is_new = [], [], False
