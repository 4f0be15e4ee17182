"""Tokenizers that llama.cpp has a name for, and chat templates in its words and Ollama's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import tiny_parts
from llavaforge.errors import UserError
from llavaforge.gguf_folder.chat_template import Spaces, for_llama_cpp, for_ollama
from llavaforge.gguf_folder.tokenizer import pre_tokenizer_name, vocabulary
from llavaforge.model_folder.chat_template import accepting_strings_and_lists

MARKER = "<__media_f8Q_x2__>"
LISTS_ALONE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + tiny_parts.CHATML
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def render(template: str, messages: list[dict[str, Any]], **tokens: str) -> str:
    options = {"add_generation_prompt": True, **tokens}
    return str(render_jinja_template([messages], chat_template=template, **options)[0][0])


@pytest.mark.parametrize("kind", tiny_parts.PRE_TOKENIZERS)
def test_each_way_of_cutting_has_its_name(kind: str, tmp_path: Path) -> None:
    tiny_parts.save_tokenizer(tmp_path, pre_tokenizer=kind)
    path = tmp_path / "tokenizer.json"
    assert pre_tokenizer_name(json.loads(path.read_text()), path) == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"byte_fallback": True}}, "Known are Prepend and Replace, or Metaspace"),
        ({"model": {"type": "Unigram"}}, "byte-level BPE"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"pre_tokenizer": None}, "byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte-level BPE"),
        ({"pre_tokenizer": {"add_prefix_space": True}}, "no name of llama.cpp's is known"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"added_tokens": [{"id": 0, "content": "<x>", "lstrip": True}]}, "spaces around it"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_parts.save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(content[key], dict) and value else value
    with pytest.raises(UserError, match=message):
        pre_tokenizer_name(content, path)


def test_rows_without_a_token_get_names_of_their_own(tmp_path: Path) -> None:
    tokenizer = tiny_parts.save_tokenizer(tmp_path)
    texts, kinds = vocabulary(json.loads((tmp_path / "tokenizer.json").read_text()), tiny_parts.VOCAB_SIZE)
    assert texts[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(set(texts)) == tiny_parts.VOCAB_SIZE and kinds.count(3) == len(tiny_parts.SPECIAL_TOKENS)


@pytest.mark.parametrize("own", [tiny_parts.CHATML, WITH_BOS, LISTS_ALONE], ids=["chatml", "bos", "lists"])
@pytest.mark.parametrize(
    ("parts", "string"),
    [
        ([IMAGE, text("What?")], f"{MARKER}What?"),
        ([text("What?"), IMAGE], f"What?{MARKER}"),
        ([text("What?"), IMAGE, text("Now?")], f"What?{MARKER}Now?"),
        ([IMAGE, IMAGE, text("What?")], f"{MARKER}{MARKER}What?"),
        ([IMAGE, text("\nWhat_>?")], f"{MARKER}\nWhat_>?"),
        ([IMAGE], MARKER),
        ([text("Hello")], "Hello"),
    ],
)
def test_llama_cpp_s_string_renders_as_our_list(own: str, parts: list[Any], string: str) -> None:
    """llama.cpp joins a message's parts with nothing between a marker and words."""
    tokens = {"bos_token": "<s>"}
    folder = accepting_strings_and_lists(own, tokens)
    around = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    expected = render(folder, [*around, {"role": "user", "content": parts}], **tokens)
    found = render(for_llama_cpp(folder, tokens), [*around, {"role": "user", "content": string}], **tokens)
    assert found.replace(MARKER, "<image>") == expected


def test_the_default_marker_is_one_too() -> None:
    found = render(for_llama_cpp(tiny_parts.CHATML, {}), [{"role": "user", "content": "What?<__media__>"}])
    assert "user\n<__media__>\nWhat?<" in found


def test_a_token_that_the_tokenizer_lacks_stays_empty() -> None:
    """llama.cpp would put its own default there."""
    messages = [{"role": "user", "content": "Hello"}]
    assert render(for_llama_cpp(WITH_BOS, {}), messages, bos_token="<its own>") == render(WITH_BOS, messages)


def ollama(template: str, messages: list[dict[str, str]]) -> str:
    """Render what `for_ollama` writes, and no other of Ollama's templates."""
    begin, turns = template.removesuffix("{{ end }}").split("{{ range .Messages }}")
    found = re.fullmatch(r"\{\{ if not \.System \}\}(.*)\{\{ end \}\}", begin, flags=re.S)
    has_system = any(message["role"] == "system" for message in messages)
    written = begin if found is None else "" if has_system else found[1]
    branches = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', turns, flags=re.S))
    for message in messages:
        written += branches.get(message["role"], "").replace("{{ .Content }}", message["content"])
    return written


DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    + tiny_parts.CHATML
)
NO_SYSTEM = tiny_parts.CHATML.replace(
    "{{ '<|im", "{% if message['role'] == 'system' %}{{ raise() }}{% endif %}{{ '<|im", 1
)


@pytest.mark.parametrize("own", [tiny_parts.CHATML, DEFAULT_SYSTEM, NO_SYSTEM], ids=["plain", "default", "none"])
@pytest.mark.parametrize("roles", ["user", "user assistant user", "system user", "system user assistant user"])
def test_ollama_s_template_renders_as_the_model_s(own: str, roles: str) -> None:
    template = for_ollama(accepting_strings_and_lists(own, {}), {})
    assert template is not None
    if own == NO_SYSTEM and "system" in roles:
        return
    messages = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles.split())]
    assert ollama(template, messages) == render(own, messages)


def test_a_template_that_ollama_cannot_say_is_left_out() -> None:
    counting = tiny_parts.CHATML.replace("message['role'] +", "message['role'] + (loop.index | string) +")
    assert for_ollama(counting, {}) is None


@pytest.mark.parametrize("roles", ["user assistant user", "system user"])
@pytest.mark.parametrize("each", [False, True])
def test_spaces_that_a_tokenizer_adds_are_in_ollama_s_template_too(roles: str, each: bool) -> None:
    tokens, own = {"eos_token": "</s>"}, tiny_parts.VICUNA.replace("' ' + message", "message", 1)
    template = for_ollama(accepting_strings_and_lists(own, tokens), tokens, Spaces(each, ["<s>", "</s>"]))
    assert template is not None
    messages = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles.split())]
    expected = " " + render(own, messages, **tokens)
    assert ollama(template, messages) == (expected.replace("</s>U", "</s> U") if each else expected)
