r"""Chat templates that take a message's content both as a string and as a list of images and texts.

Comes in: the language model's own template (or none). Goes out: the same template behind a short preamble. The image
stands in the text as `<image>`, with a newline between it and its neighbours:

    [{"type": "image"}, {"type": "text", "text": "What?"}]  ->  "<image>\nWhat?"
"""

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from llavaforge.processes.alarm import alarm

log = logging.getLogger(__name__)

# Named `llavaforge` inside, so that it cannot meet a variable of the template that follows. Templates run in an
# immutable sandbox: no list.append, hence `+ [...]`. vLLM asks whether a template loops over `message['content']` to
# know whether it takes lists. The second half is `data/rows/turns.py: image_first`.
_PREAMBLE = """\
{#- llavaforge: content may be a string or a list of images and texts; a user's only image comes first -#}
{%- set llavaforge = namespace(messages=[], text='', after_image=false) -%}
{%- for message in messages -%}
{%- if message['content'] is not defined or message['content'] is none -%}
{%- set llavaforge.messages = llavaforge.messages + [message] -%}
{%- else -%}
{%- if message['content'] is string -%}
{%- set llavaforge.text = message['content'] -%}
{%- else -%}
{%- set llavaforge.text = '' -%}
{%- set llavaforge.after_image = false -%}
{%- for part in message['content'] -%}
{%- set is_image = part is not string and part['type'] in ['image', 'image_url'] -%}
{%- set piece = '<image>' if is_image else part if part is string else part['text'] -%}
{%- if (is_image or llavaforge.after_image) and not loop.first -%}
{%- set newline = '' if llavaforge.text.endswith('\\n') or piece.startswith('\\n') else '\\n' -%}
{%- set llavaforge.text = llavaforge.text + newline -%}
{%- endif -%}
{%- set llavaforge.text = llavaforge.text + piece -%}
{%- set llavaforge.after_image = is_image -%}
{%- endfor -%}
{%- endif -%}
{%- set halves = llavaforge.text.split('<image>') -%}
{%- if message['role'] == 'user' and halves | length == 2 -%}
{%- set newline = halves[0].endswith('\\n') or halves[1].startswith('\\n') -%}
{%- set words = (halves[0].rstrip() + ('\\n' if newline else ' ') + halves[1].lstrip()).strip() -%}
{%- set llavaforge.text = '<image>' + ('\\n' + words if words else '') -%}
{%- endif -%}
{%- set llavaforge.messages = llavaforge.messages + [dict(message, content=CONTENT)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = llavaforge.messages %}
"""
_BEGIN, _END = "{#- llavaforge:", "{%- set messages = llavaforge.messages %}\n"
_AS_STRINGS = _PREAMBLE.replace("CONTENT", "llavaforge.text")
# For templates that know lists alone and drop strings in silence, such as llava-hf's own.
_AS_LISTS = _PREAMBLE.replace("CONTENT", "[{'type': 'text', 'text': llavaforge.text}]")

_LONGEST_S = 5
_MOST_MEMORY = 1 << 30

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + END }}{%- endgeneration %}
{%- else %}
{{- message['content'] + END }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def default_chat_template(tokenizer: Any) -> str:
    """Return ChatML, the default for a language model without a chat template.

    Turns end with `<|im_end|>` where that is one token of the tokenizer, else with its end-of-sequence token: an
    untrained language model should not have to learn a new way to stop. `generation` marks what is learnt, for those
    who train the model further (`return_assistant_tokens_mask` of transformers, TRL's `assistant_only_loss`).
    """
    known = "<|im_end|>" in tokenizer.get_vocab() or not tokenizer.eos_token
    return _CHATML.replace("END", "'<|im_end|>'" if known else "eos_token")


def accepting_strings_and_lists(template: str, tokens: Mapping[str, str]) -> str:
    """Return the template behind the preamble that it needs (none when it takes both kinds already).

    `tokens` are what templates may name: `bos_token`, `eos_token`, ...
    """
    text = "probe\nprobe"
    image, words = {"type": "image"}, {"type": "text", "text": text}
    contents = f"<image>\n{text}", f"{text}\n<image>", [image, words], [words, image]
    first, *others = (render(template, [{"role": "user", "content": content}], tokens) for content in contents)
    knows_strings = first is not None and text in first and "<image>" in first
    if knows_strings and all(other == first for other in others):
        return template
    knows_lists = others[1] is not None and text in others[1] and "<image>" in others[1]
    return (_AS_LISTS if knows_lists and not knows_strings else _AS_STRINGS) + template


def beginning_as_trained(template: str, tokens: Mapping[str, str]) -> str:
    """Return the template with a generation prompt after which a rendered answer begins: what training teaches.

    Qwen3's template puts an empty thought before the last answer, but not into the prompt for one: served so, a model
    begins where it never learnt to go on. Spaces before an answer are the answer's (`data/text/template.py`).
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "PROBE"}]
    trained, served = render(template, turns, tokens), render(template, turns[:1], tokens, add_generation_prompt=True)
    if trained is None or served is None or served == (begin := trained.partition("PROBE")[0].rstrip(" ")):
        return template
    has_it = render(template, turns[:1], tokens, add_generation_prompt=True, enable_thinking=False) == begin
    unless = " and not (enable_thinking is defined and enable_thinking is false)" * has_it
    rest = begin.removeprefix(served).replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    longer = template.removesuffix("\n") + f"{{% if add_generation_prompt{unless} %}}{{{{ '{rest}' }}}}{{% endif %}}"
    if (
        render(longer, turns[:1], tokens, add_generation_prompt=True) == begin
        and render(longer, turns, tokens) == trained
    ):
        log.info("the template's prompt for an answer gets %r at its end, as in training", begin.removeprefix(served))
        return longer
    log.warning(
        "the chat template begins an answer in training with %r and asks for one with %r: a model that is served with "
        "it begins where it never learnt to go on. Give another: customize-model --chat_template.", begin, served,
    )  # fmt: skip
    return template


def end_of_answer(template: str, tokenizer: Any) -> int | None:
    """Return the id of the token with which the template ends an answer (None where it writes none).

    Training teaches this token; it must stop `generate`, also where the language model's own files name another.
    """
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "PROBE"}]
    rendered = render(template, conversation, tokenizer.special_tokens_map)
    if rendered is None:
        return None
    rest = rendered.rpartition("PROBE")[2]
    ends = [token for token in tokenizer.added_tokens_encoder if rest.startswith(token)]
    return int(tokenizer.added_tokens_encoder[max(ends, key=len)]) if ends else None


@contextmanager
def bounded_rendering(limits_memory: bool = True) -> Iterator[None]:
    """Give up a template that does not end, or takes all memory: it is a program of other people's.

    Args:
        limits_memory: bound the memory too, of the whole process (on Linux): for the few renderings at the start.

    Raises:
        TimeoutError: after `_LONGEST_S`.
        MemoryError: over `_MOST_MEMORY`.
    """
    limits = _limit_memory() if limits_memory else None
    try:
        with alarm(_LONGEST_S):
            yield
    finally:
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory() -> tuple[int, int] | None:
    """Bound this process's memory; return the limits of before, None where it cannot be done."""
    try:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        bound = in_use + _MOST_MEMORY
        if soft != resource.RLIM_INFINITY and soft < bound:
            return None
        resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    except (OSError, ValueError):
        return None
    return soft, hard


def without_preamble(template: str) -> tuple[str, bool]:
    """Return a folder's template as the language model had it, and whether it takes lists of texts alone.

    The preamble may be that of another version of llavaforge.
    """
    if not template.startswith(_BEGIN) or _END not in template:
        return template, False
    preamble, _, rest = template.partition(_END)
    return rest, "'type': 'text'" in preamble


def render(template: str, conversation: list[dict[str, Any]], tokens: Mapping[str, str], **options: bool) -> str | None:
    """Return a conversation as a template writes it; None where the template fails.

    `tokens` are what it may name: `bos_token`, `eos_token`, ...
    """
    try:
        with bounded_rendering():
            rendered, _ = render_jinja_template([conversation], chat_template=template, **tokens, **options)
    except Exception:  # whatever a template raises at what it does not know
        return None
    return str(rendered[0])
