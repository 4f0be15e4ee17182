r"""Chat templates that take a message's content both as a string and as a list of images and texts.

Comes in: the language model's own template (or none). Goes out: the same template behind a short preamble. The image
stands in the text as `<image>`, with a newline between it and its neighbours:

    [{"type": "image"}, {"type": "text", "text": "What?"}]  ->  "<image>\nWhat?"
"""

from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

# Named `llavaforge` inside, so that it cannot meet a variable of the template that follows. Templates run in an
# immutable sandbox: no list.append, hence `+ [...]`.
LISTS_TO_STRINGS = """\
{#- llavaforge: content may be a string or a list of images and texts -#}
{%- set llavaforge = namespace(messages=[], text='', after_image=false) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is not defined or message['content'] is none -%}
{%- set llavaforge.messages = llavaforge.messages + [message] -%}
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
{%- set llavaforge.messages = llavaforge.messages + [dict(message, content=llavaforge.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = llavaforge.messages %}
"""

# The other way round, for llava-hf's own templates, which know lists alone and drop strings in silence.
STRINGS_TO_LISTS = """\
{#- llavaforge: content may be a string or a list of images and texts -#}
{%- set llavaforge = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- set llavaforge.messages = llavaforge.messages + [dict(message, content=parts)] -%}
{%- endfor -%}
{%- set messages = llavaforge.messages %}
"""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def default_chat_template(tokenizer: Any) -> str:
    """Return ChatML, the default for a language model without a chat template.

    Turns end with `<|im_end|>` where that is one token of the tokenizer, else with its end-of-sequence token: an
    untrained language model should not have to learn a new way to stop.
    """
    known = "<|im_end|>" in tokenizer.get_vocab() or not tokenizer.eos_token
    return _CHATML.replace("END", "'<|im_end|>'" if known else "eos_token")


def accepting_strings_and_lists(template: str, tokens: Mapping[str, str]) -> str:
    """Return the template behind the preamble that it needs (none when it takes both kinds already).

    `tokens` are what templates may name: `bos_token`, `eos_token`, ...
    """
    text = "probe\nprobe"
    contents = f"<image>\n{text}", [{"type": "image"}, {"type": "text", "text": text}]
    plain, parts = (_render(template, [{"role": "user", "content": content}], tokens) for content in contents)
    knows_strings = plain is not None and text in plain and "<image>" in plain
    knows_lists = parts is not None and text in parts and "<image>" in parts
    if knows_strings and parts == plain:
        return template
    return (STRINGS_TO_LISTS if knows_lists and not knows_strings else LISTS_TO_STRINGS) + template


def end_of_answer(template: str, tokenizer: Any) -> int | None:
    """Return the id of the token with which the template ends an answer (None where it writes none).

    Training teaches this token; it must stop `generate`, also where the language model's own files name another.
    """
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "PROBE"}]
    rendered = _render(template, conversation, tokenizer.special_tokens_map)
    if rendered is None:
        return None
    rest = rendered.rpartition("PROBE")[2]
    ends = [token for token in tokenizer.added_tokens_encoder if rest.startswith(token)]
    return int(tokenizer.added_tokens_encoder[max(ends, key=len)]) if ends else None


def _render(template: str, conversation: list[dict[str, Any]], tokens: Mapping[str, str]) -> str | None:
    try:
        rendered, _ = render_jinja_template([conversation], chat_template=template, **tokens)
    except Exception:  # whatever a template raises at what it does not know
        return None
    return str(rendered[0])
