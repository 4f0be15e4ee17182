import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llavaforge.data.rows.turns import image_first
from llavaforge.model_folder.chat_template import accepting_strings_and_lists, default_chat_template
from tiny_parts import CHATML

# llava-hf's way: images first, then texts, out of lists alone.
LIST_ONLY = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# SmolVLM's way: parts in their order.
IN_ORDER = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
STRICT = "\n{{ bos_token }}" + CHATML.replace("{% for", "{% set ns = namespace(x=1) %}{% for", 1)


def render(template, content, answer="Cats.", **options):
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    rendered, _ = render_jinja_template([conversation], chat_template=template, bos_token="<s>", **options)
    return rendered[0]


IMAGE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize("own", [CHATML, STRICT])
@pytest.mark.parametrize(
    ("parts", "string"),
    [
        ([IMAGE, WHAT], "<image>\nWhat?"),
        ([WHAT, IMAGE], "<image>\nWhat?"),
        ([WHAT, IMAGE, {"type": "text", "text": "Now?"}], "<image>\nWhat?\nNow?"),
        ([IMAGE, {"type": "text", "text": "\nWhat?"}], "<image>\nWhat?"),
        ([WHAT, {"type": "text", "text": " Now?"}], "What? Now?"),
        ([IMAGE, IMAGE, WHAT], "<image>\n<image>\nWhat?"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, "What?"], "<image>\nWhat?"),
        ([], ""),
    ],
)
def test_lists_render_as_the_string_with_image_on_a_line_of_its_own(own, parts, string):
    template = accepting_strings_and_lists(own, {"bos_token": "<s>"})
    assert render(template, parts) == render(template, string) == render(own, string)


@pytest.mark.parametrize("own", [CHATML, STRICT])
def test_strings_render_to_the_byte_as_with_the_model_s_own_template(own):
    template = accepting_strings_and_lists(own, {"bos_token": "<s>"})
    for content in ("Hello", " two\n lines ", "<image>\nWhat?"):
        for generate in (False, True):
            options = {"add_generation_prompt": generate}
            assert render(template, content, **options) == render(own, content, **options)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "<image>\nWhat?",
            "What?\n<image>",
            "What? <image>",
            "<image>What?",
            "Is <image> red?",
            "a\n<image> b",
            "<image>",
        ),
        *("<image> <image> differ?", "What?", "\n <image>\n\n a \n"),
    ],
)
@pytest.mark.parametrize("own", [CHATML, STRICT])
def test_a_template_puts_a_user_s_only_image_where_training_puts_it(own, text):
    template = accepting_strings_and_lists(own, {"bos_token": "<s>"})
    assert render(template, text) == render(own, image_first(text))
    assert image_first(image_first(text)) == image_first(text)
    asked = [{"role": "user", "content": "Which tag?"}, {"role": "assistant", "content": text}]
    plain, ours = (render_jinja_template([asked], chat_template=one, bos_token="<s>")[0][0] for one in (own, template))
    assert ours == plain  # an answer is no question


def test_a_template_of_lists_alone_learns_strings():
    template = accepting_strings_and_lists(LIST_ONLY, {})
    assert render(LIST_ONLY, "What?") != render(template, "What?")
    answer = [{"type": "text", "text": "Cats."}]
    assert render(template, [IMAGE, WHAT]) == render(LIST_ONLY, [IMAGE, WHAT], answer)
    for string in ("<image>\nWhat?", "What?\n<image>"):
        assert "USER: <image>\nWhat?" in render(template, string)


def test_a_template_of_lists_in_their_order_puts_the_only_image_first_all_the_same():
    template, answer = accepting_strings_and_lists(IN_ORDER, {}), [{"type": "text", "text": "Cats."}]
    expected = render(IN_ORDER, [{"type": "text", "text": "<image>\nWhat?"}], answer)
    for content in ([IMAGE, WHAT], [WHAT, IMAGE], "What?\n<image>", "<image>What?"):
        assert render(template, content) == expected


@pytest.mark.parametrize("own", [CHATML, STRICT, LIST_ONLY, IN_ORDER])
def test_a_client_that_looks_for_a_loop_over_the_content_finds_it(own):
    """vLLM reads the template's syntax tree to know whether it takes lists."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        accepting_strings_and_lists(own, {"bos_token": ""})
    )
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    assert any(isinstance(it, jinja2.nodes.Getitem) and getattr(it.arg, "value", "") == "content" for it in loops)


@pytest.mark.parametrize("own", [CHATML, STRICT, LIST_ONLY, IN_ORDER])
def test_preparing_a_template_twice_changes_nothing(own):
    once = accepting_strings_and_lists(own, {"bos_token": "<s>"})
    assert accepting_strings_and_lists(once, {"bos_token": "<s>"}) == once


class FakeTokenizer:
    def __init__(self, vocabulary, eos_token):
        self.get_vocab = lambda: dict.fromkeys(vocabulary, 0)
        self.eos_token = eos_token


def test_the_default_template_is_chatml_and_ends_turns_with_a_token_that_the_model_knows():
    conversation = [{"role": "user", "content": "Hi"}]
    knows = default_chat_template(FakeTokenizer(["<|im_end|>"], "</s>"))
    rendered, _ = render_jinja_template([conversation], chat_template=knows, add_generation_prompt=True)
    assert rendered[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    other = default_chat_template(FakeTokenizer([], "</s>"))
    rendered, _ = render_jinja_template([conversation], chat_template=other, eos_token="</s>")
    assert rendered[0] == "<|im_start|>user\nHi</s>\n"


def test_the_default_template_marks_what_is_learnt_for_those_who_train_further():
    template = default_chat_template(FakeTokenizer(["<|im_end|>"], "</s>"))
    spoken = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"))] * 2
    rendered, learnt = render_jinja_template(
        [spoken], chat_template=accepting_strings_and_lists(template, {}), return_assistant_tokens_mask=True
    )
    assert [rendered[0][start:end] for start, end in learnt[0]] == ["Ho<|im_end|>", "Ho<|im_end|>"]
