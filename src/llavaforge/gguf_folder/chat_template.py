r"""The chat template of `model.gguf`, and of Ollama's Modelfile.

Comes in: a model folder's chat template. Goes out: the same for llama.cpp, whose clients put a marker where the image
is, into one string with the words; and the pieces of it that Ollama's templates can say.

    "<__media_QfX__>What?"  ->  "<__media_QfX__>\nWhat?"
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llavaforge.model_folder.chat_template import render, without_preamble

# llama.cpp's Jinja has no `dict(...)`. What `model_folder/chat_template.py` does with `<image>`: a newline between an
# image and the words that touch it, and a user's only image first.
_PREAMBLE = """\
{#- llavaforge: llama.cpp's marker of an image stands apart from the words; a user's only image comes first -#}
{%- set llavaforge = namespace(messages=[], text='', marker='') -%}
{%- for message in messages -%}
{%- if message['content'] is string and '<__media_' in message['content'] -%}
{%- set pieces = message['content'].split('<__media_') -%}
{%- set llavaforge.text = pieces[0] -%}
{%- for piece in pieces[1:] -%}
{%- set halves = piece.split('_>', 1) -%}
{%- set llavaforge.marker = '<__media_' + halves[0] + '_>' -%}
{%- set touches = llavaforge.text and llavaforge.text.rstrip() == llavaforge.text -%}
{%- set llavaforge.text = llavaforge.text + ('\\n' if touches else '') + llavaforge.marker -%}
{%- set touches = halves[1] and halves[1].lstrip() == halves[1] -%}
{%- set llavaforge.text = llavaforge.text + ('\\n' if touches else '') + halves[1] -%}
{%- endfor -%}
{%- if message['role'] == 'user' and pieces | length == 2 -%}
{%- set halves = llavaforge.text.split(llavaforge.marker) -%}
{%- set newline = halves[0].endswith('\\n') or halves[1].startswith('\\n') -%}
{%- set words = (halves[0].rstrip() + ('\\n' if newline else ' ') + halves[1].lstrip()).strip() -%}
{%- set llavaforge.text = llavaforge.marker + ('\\n' + words if words else '') -%}
{%- endif -%}
{%- set llavaforge.messages = llavaforge.messages + [{'role': message['role'], 'content': CONTENT}] -%}
{%- else -%}
{%- set llavaforge.messages = llavaforge.messages + [OTHER] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = llavaforge.messages %}
"""

_LIST = "[{'type': 'text', 'text': TEXT}]"
_LISTED = (
    "{'role': message['role'], 'content': " + _LIST.replace("TEXT", "message['content']") + "} "
    "if message['content'] is string else message"
)

# A mark, which no text has, stands where the tokenizer begins a piece of text; it becomes a space where there is none.
_MARK = "\ufdd0"
_SPACED = """\
{%- set llavaforge_prompt %}{{ '' }}TEMPLATE{{ '' }}{% endset -%}
{%- set llavaforge_added = ADDED -%}
{%- set llavaforge_spaced = namespace(text='MARK' + llavaforge_prompt) -%}
{%- for token in (llavaforge_added if EACH else []) -%}
{%- set llavaforge_spaced.text = llavaforge_spaced.text.replace(token, token + 'MARK') -%}
{%- endfor -%}
{%- for token in llavaforge_added + [' ', '▁'] -%}
{%- set llavaforge_spaced.text = llavaforge_spaced.text.replace('MARK' + token, token) -%}
{%- endfor -%}
{%- if llavaforge_spaced.text.endswith('MARK') -%}
{%- set llavaforge_spaced.text = llavaforge_spaced.text[:-1] -%}
{%- endif -%}
{{- llavaforge_spaced.text.replace('MARK', ' ') -}}
"""


@dataclass(frozen=True)
class Spaces:
    """The spaces of its own that a tokenizer puts into a prompt, and llama.cpp's does not: the template writes them.

    Attributes:
        each: before every piece of text between added tokens, not only before a prompt that begins with text.
        added: the added tokens.
    """

    each: bool
    added: Sequence[str]


def _spaced(template: str, spaces: Spaces | None, marker: str) -> str:
    """Return a template that writes these spaces where no space is; `marker` is a list in Jinja of what is an image."""
    if spaces is None:
        return template
    added = f"{json.dumps([*spaces.added], ensure_ascii=False)} + {marker}"
    before, after = _SPACED.replace("MARK", _MARK).replace("EACH", str(spaces.each).lower()).split("TEMPLATE")
    return before + template.removesuffix("\n") + after.replace("ADDED", added)


def for_llama_cpp(template: str, tokens: Mapping[str, str], spaces: Spaces | None = None) -> str:
    """Return a model folder's template for `tokenizer.chat_template` of a GGUF file.

    Args:
        template: the folder's.
        tokens: what the tokenizer has of `bos_token`, `eos_token`, ...; llama.cpp fills in others where there is none.
        spaces: that the template has to write.
    """
    inner, takes_lists_alone = without_preamble(template)
    content, other = "llavaforge.text", "message"
    if takes_lists_alone:
        content, other = _LIST.replace("TEXT", content), _LISTED
    missing = [name for name in ("bos_token", "eos_token") if name in inner and name not in tokens]
    unset = "".join(f"{{%- set {name} = '' -%}}\n" for name in missing)
    return (
        unset
        + _PREAMBLE.replace("CONTENT", content).replace("OTHER", other)
        + _spaced(inner, spaces, "([llavaforge.marker] if llavaforge.marker else [])")
    )


def for_ollama(template: str, tokens: Mapping[str, str], spaces: Spaces | None = None) -> str | None:
    """Return a model folder's template in Ollama's own language (Go's), for conversations of system, user, assistant.

    What stands between the turns is found by rendering; each turn is written with what follows it.

    Args:
        template: the folder's.
        tokens: as in `for_llama_cpp`.
        spaces: as in `for_llama_cpp`.

    Returns:
        None where the template cannot be said so.
    """
    template = _spaced(template, spaces, "[]")
    system, user, answer = ({"role": role, "content": f"PROBE {role}"} for role in ("system", "user", "assistant"))
    turns = [user, answer, user]
    pieces = _around(render(template, [system, *turns], tokens, add_generation_prompt=True), [system, *turns])
    first = _around(render(template, turns, tokens, add_generation_prompt=True), turns)
    if first is None or any("{{" in piece or '"""' in piece for piece in [*first, *(pieces or [])]):
        return None
    begin, after_user, after_answer, end = first
    if after_user != end:  # an answer begins otherwise than it is asked for
        return None
    system_turn, otherwise = "", begin
    if pieces is not None and pieces[2:] == [after_user, after_answer, end]:
        system_turn = f'{{{{ if eq .Role "system" }}}}{pieces[0]}{{{{ .Content }}}}{pieces[1]}{{{{ end }}}}'
        otherwise = f"{{{{ if not .System }}}}{begin}{{{{ end }}}}"
    others = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{after_user}{{{{ end }}}}'
    others += f'{{{{ if eq .Role "assistant" }}}}{{{{ .Content }}}}{after_answer}{{{{ end }}}}'
    return f"{otherwise}{{{{ range .Messages }}}}{system_turn}{others}{{{{ end }}}}"


def _around(text: str | None, turns: list[dict[str, str]]) -> list[str] | None:
    """Return what stands before, between and after the turns' words; None where one of them is missing."""
    if text is None:
        return None
    pieces = []
    for turn in turns:
        piece, found, text = text.partition(turn["content"])
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]
