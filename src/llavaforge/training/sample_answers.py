"""Answers about held-out samples while a run goes on, and how right they are.

Comes in: the stage and its model. Goes out: metrics for a line of metrics.jsonl, and `output_dir/eval_answers.jsonl`:

    {"step": 100, "sample": 17, "question": "What colour is the circle?", "reference": "red", "answer": "blue",
     "exact_match": 0.0}
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from llavaforge.answers.generate import Answerer
from llavaforge.answers.metrics import References, chosen, measure
from llavaforge.data.index.index import Row
from llavaforge.data.index.open import sample_builder
from llavaforge.data.index.records import records_of_rows
from llavaforge.data.load.loader import BadImage
from llavaforge.data.order.run_data import HeldOut
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, Turn
from llavaforge.data.text.template import ChatTemplate
from llavaforge.errors import is_out_of_memory
from llavaforge.files import append_line, read_json_lines, replace_text, to_json
from llavaforge.processes.world import World
from llavaforge.report.pictures import thumbnail_url
from llavaforge.training.opening import OpenedStage

ANSWERS = "eval_answers.jsonl"
_BATCH = 16


class Asked(NamedTuple):
    """A held-out sample that is asked."""

    number: int
    row: Row
    prompt: Sequence[int]
    question: str
    reference: str


class SampleAnswers:
    """Asks the same held-out samples at every evaluation, spread over all of them; processes share them.

    Args:
        opened: the stage.
        held_out: where samples are taken from, `eval_generate_samples` of them.
        world: the processes.
        start_step: steps done before; lines of later ones are dropped from the file.

    Raises:
        UserError: a metric of `eval_metrics` does not suit the samples.
    """

    def __init__(self, opened: OpenedStage, held_out: HeldOut, world: World, start_step: int) -> None:
        config = opened.config
        self._opened, self._world = opened, world
        self._dataset = opened.dataset(held_out.index, masks_bad=False)
        places = np.linspace(0, len(held_out.rows) - 1, min(config.eval_generate_samples, len(held_out.rows)))
        numbers = [int(held_out.rows[int(place)]) for place in places]
        builder = sample_builder(opened.loaded.processor, opened.loaded.num_image_tokens, config)
        self._asked = [_asked(number, held_out.index.row(number), builder.chat) for number in numbers]
        self._references: list[References] = [(one.reference,) for one in self._asked]
        if "vqa" in config.eval_metrics:
            records = records_of_rows(held_out.index, numbers)
            self._references = [record.answers or own for record, own in zip(records, self._references, strict=True)]
        self._metrics = chosen(config.eval_metrics, self._references)
        self._answerer = Answerer(opened.loaded, config, config.eval_max_new_tokens)
        self._batch = min(_BATCH, config.max_samples_per_batch)  # so that the peak of memory stays that of training
        self._file = config.output_dir / ANSWERS
        if world.is_writer and (start_step or self._file.is_file()):
            kept = [line for line in read_json_lines(self._file) if line["step"] <= start_step]
            replace_text(self._file, "".join(to_json(line) + "\n" for line in kept))

    def __call__(self, step: int) -> dict[str, float]:
        """Answer, write the answers down, and return the metrics as `eval_NAME`; all processes call this."""
        found: dict[int, str] = {}
        for answers in self._world.all_gather_objects(self._answers(step)):
            found |= answers
        said = [number for number in range(len(self._asked)) if number in found]
        if not said:
            return {}
        texts = [found[number] for number in said]
        references = {"answer": [self._references[number] for number in said]}
        scores = measure(self._metrics, {"answer": texts}, references)
        if self._world.is_writer:
            for place, number in enumerate(said):
                asked = self._asked[number]
                line: dict[str, Any] = {"step": step, "sample": asked.number, "question": asked.question}
                line |= {"reference": asked.reference, "answer": texts[place]}
                append_line(self._file, line | {name: values[place] for name, values in scores.of_samples.items()})
        return {f"eval_{name}": value for name, value in scores.of_all.items()}

    def thumbnails(self, most: int) -> dict[int, list[str]]:
        """Return small pictures of some samples' images as data URLs, by the samples' numbers.

        Args:
            most: of how many samples, spread over all that are asked.
        """
        shown = self._asked[:: -(-len(self._asked) // most)]
        return {one.number: [thumbnail_url(image) for image in self._pixels(one) or ()] for one in shown}

    def _answers(self, step: int) -> dict[int, str]:
        """Return this process's answers, by place among the samples."""
        mine = list(range(len(self._asked)))[self._world.rank :: self._world.size]
        found: dict[int, str] = {}
        model = self._opened.loaded.model
        model.eval()
        # Compiled layers would be compiled anew for the cache, and for every length.
        with torch.compiler.set_stance("force_eager"):
            for begin in range(0, len(mine), self._batch):
                self._world.at_step(step + 1, "answering held-out samples")
                batch = {number: self._pixels(self._asked[number]) for number in mine[begin : begin + self._batch]}
                found |= self._answers_of({number: pixels for number, pixels in batch.items() if pixels is not None})
        model.train()
        return found

    def _answers_of(self, batch: dict[int, list[Any]]) -> dict[int, str]:
        """Return the answers of a batch, in halves where it does not fit in memory."""
        if not batch:
            return {}
        prompts = [self._asked[number].prompt for number in batch]
        images = [image for pixels in batch.values() for image in pixels]
        try:
            return dict(zip(batch, self._answerer.of_prompts(prompts, images), strict=True))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        numbers, half = list(batch), len(batch) // 2
        parts = ({number: batch[number] for number in part} for part in (numbers[:half], numbers[half:]))
        return {number: answer for part in parts for number, answer in self._answers_of(part).items()}

    def _pixels(self, asked: Asked) -> list[Any] | None:
        """Return the pixels of a sample's images; None where one cannot be read, which the held-out loss tells."""
        try:
            return self._dataset.pixels(asked.row)
        except BadImage:
            return None


def _asked(number: int, row: Row, chat: ChatTemplate) -> Asked:
    """Take a sample apart: what comes before its last answer, and that answer."""
    begin, end = (int(place) for place in row.supervised_spans[-2:])
    before = int(row.supervised_spans[-3]) if len(row.supervised_spans) > 2 else 0
    decode = chat.tokenizer.decode
    reference = decode(row.ids[begin:end], skip_special_tokens=True).strip()
    question = _question(decode(row.ids[before:begin], skip_special_tokens=False), chat)
    return Asked(number, row, row.ids[:begin].tolist(), question, reference)


def _question(prompt: str, chat: ChatTemplate) -> str:
    """Return the user's words of the rendered text between two answers; all of it where the template hides them."""
    turns = Turn("user", "A"), Turn("assistant", "B"), Turn("user", "?+?")
    before, _, after = chat.prompt(turns).partition("?+?")
    opening = before.rpartition("B")[2].removeprefix(chat.answer_end).lstrip()
    text = prompt.rpartition(opening)[2] if opening else prompt
    return text.removesuffix(after).replace(IMAGE_PLACEHOLDER, "").strip()
