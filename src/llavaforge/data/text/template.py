r"""A conversation as text spans, each marked supervised or not, from the model's own chat template.

Comes in: the turns of a record. Goes out: spans that add up, character by character, to what the template renders.

A template is a program, so its literal text is learnt by rendering it once per shape of conversation with markers
in place of the contents. The spans are then proved against a rendering of the real contents; a
template that changes its contents fails that proof and the record is refused, rather than trained on wrong labels.

    [("<|im_start|>user\\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n", False),
     ("A red square.<|im_end|>", True), ("\n", False)]
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from transformers.utils.chat_template_utils import _compile_jinja_template

from llavaforge.data.faults import RecordError
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER, Turn
from llavaforge.errors import UserError, reason
from llavaforge.model_folder.chat_template import bounded_rendering


class TextSpan(NamedTuple):
    """A stretch of text; the loss sees its tokens when it is supervised."""

    text: str
    supervised: bool


@dataclass(frozen=True, eq=False)  # told apart by identity: `_literals` remembers what it learnt of each
class ChatTemplate:
    """Renders turns in one style.

    Attributes:
        tokenizer: a fast tokenizer.
        template: the Jinja chat template (chat style).
        style: `chat`, or `plain` (LLaVA's stage 1: images and caption without the instruction).
        system_prompt: system message put first (chat style); a record's own system turn wins.
        keeps_special_tokens: keep special tokens in texts, but for those that the template itself writes.
    """

    tokenizer: Any
    template: str
    style: Literal["chat", "plain"]
    system_prompt: str | None
    keeps_special_tokens: bool = False

    def spans(self, turns: Sequence[Turn]) -> list[TextSpan]:
        """Return the spans of a whole conversation.

        Raises:
            RecordError: the template changes these contents, so that labels could not be trusted.
        """
        if self.style == "plain":
            return self._plain(turns)
        if self.system_prompt is not None and turns[0].role != "system":
            turns = [Turn("system", self.system_prompt), *turns]
        contents = [self.escape(turn) for turn in turns]
        literals, ends = self._literals_of(tuple(turn.role for turn in turns))
        whole = "".join(a + b for a, b in zip(literals, [*contents, ""], strict=True))
        messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]
        if whole != self._render(messages):
            raise RecordError(
                "unprovable_labels",
                "the chat template changes this text, so labels cannot be proved. Remove unusual markers (such as "
                "<think>) from it, or give another template: customize-model --chat_template.",
            )
        return self._mark(turns, contents, literals, ends)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the text that stands before the answer to turns that end with a user's, exactly as in training."""
        spans = self.spans([*turns, Turn("assistant", "x")])
        answer = max(number for number, span in enumerate(spans) if span.supervised)
        return "".join(span.text for span in spans[:answer])

    def escape(self, turn: Turn) -> str:
        """Return a turn's text in which no special token can hide: `<|im_end|>` becomes `< |im_end|>`.

        The `<image>` of a user turn stay.
        """
        if not self._split.search(turn.text):
            return turn.text
        pieces = turn.text.split(IMAGE_PLACEHOLDER) if turn.role == "user" else [turn.text]
        return IMAGE_PLACEHOLDER.join(
            self._split.sub(lambda found: found[0][0] + " " + found[0][1:], piece) for piece in pieces
        )

    def num_special_tokens(self, turns: Sequence[Turn]) -> int:
        """Return how many special tokens stand in texts that may be kept: not those that are always split."""
        found = (token for turn in turns for token in self._special.findall(turn.text))
        return sum(token not in self._own_tokens for token in found)

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special} | {IMAGE_PLACEHOLDER}
        return sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return _any_of(self._special_tokens)

    @cached_property
    def _own_tokens(self) -> set[str]:
        """The special tokens that mark turns and images, and would end or begin one in a text."""
        kinds = ("bos_token", "eos_token", "pad_token", "unk_token")
        own = {IMAGE_PLACEHOLDER, *(getattr(self.tokenizer, kind) for kind in kinds)}
        literals = "".join(_literals(self, ("user", "assistant", "user", "assistant"))[0]) if self.template else ""
        return {token for token in self._special_tokens if token in own or token in literals}

    @cached_property
    def _split(self) -> re.Pattern[str]:
        """Finds the special tokens that are split in texts."""
        is_split = self._own_tokens if self.keeps_special_tokens else set(self._special_tokens)
        return _any_of([token for token in self._special_tokens if token in is_split])

    @cached_property
    def end_token(self) -> str:
        """The token that ends an answer where the template itself writes none."""
        if not self.tokenizer.eos_token:
            raise UserError(
                "The tokenizer has no eos_token, so answers could not end. Set it in tokenizer_config.json."
            )
        return str(self.tokenizer.eos_token)

    @cached_property
    def answer_end(self) -> str:
        """The token that ends an answer in training: the template's own, or else `end_token`."""
        if self.style == "plain":
            return self.end_token
        return _literals(self, ("user", "assistant"))[1][-1].strip() or self.end_token

    @cached_property
    def begins_answers_with_spaces(self) -> bool:
        """Whether the template writes spaces before an answer, which belong to it."""
        roles = ("user", "assistant") if self.system_prompt is None else ("system", "user", "assistant")
        return self.style == "chat" and _literals(self, roles)[0][-2].endswith(" ")

    @cached_property
    def bos_token(self) -> str:
        """What the tokenizer itself puts before a plain text (empty for most)."""
        bos = self.tokenizer.bos_token
        ids = self.tokenizer("a").input_ids
        return str(bos) if bos and ids and ids[0] == self.tokenizer.bos_token_id else ""

    def _plain(self, turns: Sequence[Turn]) -> list[TextSpan]:
        num_images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
        answer = next(self.escape(turn) for turn in turns if turn.role == "assistant")
        return [
            TextSpan(self.bos_token + IMAGE_PLACEHOLDER * num_images, False),
            TextSpan(answer + self.end_token, True),
        ]

    def _mark(self, turns: Sequence[Turn], contents: list[str], literals: list[str], ends: list[str]) -> list[TextSpan]:
        spans: list[TextSpan] = []
        for number, (turn, content) in enumerate(zip(turns, contents, strict=True)):
            before = literals[number][len(ends[number]) :]
            if turn.role == "assistant":
                # Spaces before an answer are its own ("ASSISTANT: red"): most tokenizers make one token of a space and
                # a word, and a prompt that ended with the space would be followed by what was never learnt there.
                prompt = before.rstrip(" ")
                # Vicuna-style templates write no end of their own: without one answers would never stop.
                answer = before[len(prompt) :] + content + (ends[number + 1] or self.end_token)
                spans += [TextSpan(prompt, False), TextSpan(answer, True)]
            else:
                spans += [TextSpan(before, False), TextSpan(content, False)]
        spans.append(TextSpan(literals[-1][len(ends[-1]) :], False))
        return spans

    def _literals_of(self, roles: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Return the template's literal text for a conversation of these roles.

        Raises:
            RecordError: the template has no place for one of them; it has for others.
            UserError: the template renders no conversation at all.
        """
        try:
            return _literals(self, roles)
        except UserError as error:
            usual = ("user", "assistant") if self.system_prompt is None else ("system", "user", "assistant")
            if roles == usual:
                raise
            _literals(self, usual)
            raise RecordError("unprovable_labels", f"{error} Or leave this record out.") from None

    def __getstate__(self) -> dict[str, Any]:  # without the compiled template
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def _render(self, messages: list[dict[str, Any]], limits_memory: bool = False) -> str:
        try:
            with bounded_rendering(limits_memory):
                if self._list_content:
                    messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
                return self._direct(messages) if self._renders_directly else self._usual(messages)
        except Exception as error:
            roles = list(dict.fromkeys(message["role"] for message in messages))
            drop = "Drop system_prompt, or give" if self.system_prompt is not None else "Give"
            raise UserError(
                f"The chat template cannot render a conversation of the roles {', '.join(roles)} ({reason(error)}). "
                f"{drop} a template that has a place for them: customize-model --chat_template."
            ) from None

    def _usual(self, messages: list[dict[str, Any]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False))

    @cached_property
    def _renders_directly(self) -> bool:
        """Whether the compiled template, run without transformers' way around it, gives the same text.

        That way takes half of the time of preparing a record: 110 us for copies and a new set of globals.
        """
        probe = [{"role": role, "content": f" {role} <b>\u00e9\n "} for role in ("user", "assistant") * 2]
        try:
            return self._direct(probe) == self._usual(probe)
        except Exception:
            return False

    def _direct(self, messages: list[dict[str, Any]]) -> str:
        template, constants = self._compiled
        context = template.new_context({**constants, "messages": messages}, shared=True)
        return "".join(template.root_render_func(context))

    @cached_property
    def _compiled(self) -> tuple[Any, dict[str, Any]]:
        template = _compile_jinja_template(self.template)
        nothing = {"tools": None, "documents": None, "add_generation_prompt": False}
        return template, {**template.globals, **self.tokenizer.special_tokens_map, **nothing}

    @cached_property
    def _list_content(self) -> bool:
        """Whether the template knows only OpenAI-style lists (llava-hf's own): it drops plain strings in silence."""
        probe = [{"role": "user", "content": "PROBE"}]
        try:
            return "PROBE" not in self._usual(probe)
        except Exception:
            return True


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # the longest come first; (?!) is never found


@lru_cache(maxsize=4096)
def _literals(chat: ChatTemplate, roles: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Learn a template's literal text around each content, and the end token after each answer.

    Returns:
        `len(roles) + 1` literals, and for each of them the leading part of it that ends the answer before it.
    """
    markers = [f"\x01{number}\x02" for number in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, markers, strict=True)]
    rest = chat._render(messages, limits_memory=True)
    literals = []
    for role, mark in zip(roles, markers, strict=True):
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise UserError(
                f"The chat template does not write the {role} text exactly once. "
                "Give another one with customize-model --chat_template."
            )
        literals.append(before)
    literals.append(rest)
    ends = [""]
    for number, role in enumerate(roles, 1):
        ends.append(_answer_end(chat, literals[number]) if role == "assistant" else "")
    return literals, ends


def _answer_end(chat: ChatTemplate, literal: str) -> str:
    """Return the start of `literal` up to its first special token, when only white space comes before that."""
    text = literal.lstrip()
    for token in chat._special_tokens:
        if text.startswith(token):
            return literal[: len(literal) - len(text) + len(token)]
    return ""
