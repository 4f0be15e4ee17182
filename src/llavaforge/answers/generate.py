"""Answers from a model: greedy or sampled, several prompts at once.

Comes in: a `LoadedModel`, prompts as training saw them, pixels. Goes out: texts.

Legend: B prompts, T tokens of the longest prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llavaforge.answers.prefill import Prefill, expanded
from llavaforge.config.schema import SampleOptions
from llavaforge.data.index.open import sample_builder
from llavaforge.data.pixels.preprocessing import Pixels, Preprocessing
from llavaforge.data.rows.turns import Turn
from llavaforge.model.attention import stock_attention
from llavaforge.model.load import LoadedModel
from llavaforge.model.tower import normalize


@dataclass(frozen=True)
class Question:
    """What is asked: the turns up to the answer (the last one is the user's) and the pixels of their images."""

    turns: tuple[Turn, ...]
    pixels: Sequence[Pixels] = ()


class _Pieces(TextStreamer):
    """Hands on an answer's text, word by word."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate`."""
        self._on_text(text)


class _Stop(StoppingCriteria):
    """Ends all answers once it is told to."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called by `generate` after each token; returns (B,)."""
        return torch.full(input_ids.shape[:1], self._is_stopped(), device=input_ids.device)


class Answerer:
    """Generates answers; `<image>` is never among the generated tokens.

    Args:
        loaded: the model, on its device and in its compute type.
        options: prompt style and system prompt.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
    """

    def __init__(
        self, loaded: LoadedModel, options: SampleOptions, max_new_tokens: int, temperature: float = 0.0
    ) -> None:
        self._loaded = loaded
        self._builder = sample_builder(loaded.processor, loaded.num_image_tokens, options)
        end_ids, pad_id = self._end_ids(), loaded.processor.tokenizer.pad_token_id
        self._settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            # Whatever the language model's own generation_config.json has of these.
            "use_cache": True,
            "cache_implementation": None,
            "num_beams": 1,
            "do_sample": temperature > 0,
            "temperature": temperature or None,
            "top_p": None,
            "top_k": None,
            "suppress_tokens": [loaded.image_token_id],
            "eos_token_id": end_ids,
            "pad_token_id": end_ids[0] if pad_id is None else pad_id,
        }

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model's images become pixels."""
        return self._loaded.preprocessing

    def __call__(
        self,
        questions: Sequence[Question],
        on_text: Callable[[str], None] | None = None,
        is_stopped: Callable[[], bool] | None = None,
    ) -> list[str]:
        """Return one answer per question.

        Args:
            questions: any number of them; one where there is `on_text`.
            on_text: told each piece of the answer's text as soon as it is sure.
            is_stopped: asked after each token whether the answers are to end there.
        """
        pixels = [image for question in questions for image in question.pixels]
        return self.of_prompts([self._ids(question) for question in questions], pixels, on_text, is_stopped)

    def of_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Pixels],
        on_text: Callable[[str], None] | None = None,
        is_stopped: Callable[[], bool] | None = None,
    ) -> list[str]:
        """Return one answer per prompt.

        Args:
            prompts: token ids with one `<image>` per image.
            images: in the order of their placeholders.
            on_text: as above.
            is_stopped: as above.
        """
        seen = self._images([torch.from_numpy(image) for image in images])
        return self._generate([self._expanded(prompt) for prompt in prompts], seen, on_text, is_stopped)

    def after(self, prefill: Prefill, questions: Sequence[Question]) -> list[str]:
        """Return one answer per question, each the prompt of a sample of a pack that the model has seen already.

        The pack's keys and values are given up.
        """
        prompts = [self._expanded(self._ids(question)) for question in questions]
        numbers = range(len(prompts))
        # The last token is never taken from the pack: it predicts the first of the answer. Where an answer's first
        # characters belong to a token of the prompt, the sample has another token there.
        common = [min(prefill.num_common(number, ids), len(ids) - 1) for number, ids in enumerate(prompts)]
        rest = max(len(ids) - same for ids, same in zip(prompts, common, strict=True))
        num_kept = [max(len(ids) - rest, 0) for ids in prompts]
        seen = prefill.images(numbers, num_kept)
        return self._generate(prompts, seen | {"past_key_values": prefill.cache(numbers, num_kept, is_last=True)})

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        seen: dict[str, Any],
        on_text: Callable[[str], None] | None = None,
        is_stopped: Callable[[], bool] | None = None,
    ) -> list[str]:
        """Return one answer per prompt, which has every image token written out; `seen` is for the stock model."""
        tokenizer, device = self._loaded.processor.tokenizer, self._loaded.model.device
        longest = max(map(len, prompts))
        pad = self._settings["pad_token_id"]
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        with torch.no_grad(), stock_attention(self._loaded.model):
            output = self._loaded.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                streamer=None if on_text is None else _Pieces(tokenizer, on_text),
                stopping_criteria=StoppingCriteriaList([] if is_stopped is None else [_Stop(is_stopped)]),
                **seen,
                **self._settings,
            )
        answers: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def _ids(self, question: Question) -> list[int]:
        text = self._builder.chat.prompt(question.turns)
        ids: list[int] = self._loaded.processor.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _expanded(self, ids: Sequence[int]) -> list[int]:
        """Return token ids with every image token written out."""
        return expanded(ids, self._loaded.image_token_id, self._loaded.num_image_tokens)

    def _images(self, pixels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if not pixels:  # the stock model would try to encode a `pixel_values` of None
            return {}
        model = self._loaded.model
        tower_dtype = next(model.model.vision_tower.parameters()).dtype
        stacked = torch.stack(pixels).to(model.device)
        return {"pixel_values": normalize(stacked, self._loaded.preprocessing, tower_dtype)}

    def _end_ids(self) -> list[int]:
        """Return every token that ends an answer: the template's, the tokenizer's, the generation config's."""
        tokenizer, known = self._loaded.processor.tokenizer, self._loaded.model.generation_config.eos_token_id
        ids = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
        ids.add(tokenizer.convert_tokens_to_ids(self._builder.chat.answer_end))
        return sorted(token for token in ids if token is not None)
