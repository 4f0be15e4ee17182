"""Labels come from the model's own template: the answer and its end token are supervised, nothing else."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_parts
from llavaforge.data.faults import RecordError
from llavaforge.data.rows.records import Record
from llavaforge.data.rows.turns import Turn
from llavaforge.data.storage.image_ref import ImageRef
from llavaforge.data.text.sample import IGNORE_INDEX, SampleBuilder
from llavaforge.data.text.template import ChatTemplate
from llavaforge.errors import UserError

QWEN15 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA_LISTS = (  # as llava-hf/llava-1.5 has it: list content only, and no end of its own
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN3_LIKE = (  # an empty thought before the last answer, and thoughts cut out of contents
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
)
TEMPLATES = {"qwen15": QWEN15, "llama2": LLAMA2, "vicuna": VICUNA_LISTS, "qwen3": QWEN3_LIKE}
CONVERSATION = (
    Turn("user", "<image>\nWhat is this?"),
    Turn("assistant", "A red square."),
    Turn("user", "And its size?"),
    Turn("assistant", "Small"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    fast = tiny_parts.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.bos_token = "<|endoftext|>"
    return fast


def builder(tokenizer: Any, template: str, max_length: int = 2048, **options: Any) -> SampleBuilder:
    chat = ChatTemplate(tokenizer, template, options.get("style", "chat"), options.get("system_prompt"))
    return SampleBuilder(tokenizer, chat, tokenizer.convert_tokens_to_ids("<image>"), 4, max_length)


def record(*turns: Turn, image: str | None = "a.jpg") -> Record:
    return Record("a", (ImageRef(image),) if image else (), turns)


def supervised_text(tokenizer: Any, made: SampleBuilder, *turns: Turn, image: str | None = "a.jpg") -> list[str]:
    sample = made.build(record(*turns, image=image))
    spans = zip(sample.supervised_spans[::2], sample.supervised_spans[1::2], strict=True)
    return [tokenizer.decode(sample.ids[start:end]) for start, end in spans]


@pytest.mark.parametrize(
    ("name", "end"),
    [("qwen15", "<|im_end|>"), ("llama2", " <|im_end|>"), ("vicuna", "<|im_end|>"), ("qwen3", "<|im_end|>")],
)
def test_answers_and_their_end_tokens_are_supervised(tokenizer: Any, name: str, end: str) -> None:
    found = supervised_text(tokenizer, builder(tokenizer, TEMPLATES[name]), *CONVERSATION)
    assert [text.strip() for text in found] == [f"A red square.{end}", f"Small{end}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_add_up_to_what_the_template_renders(tokenizer: Any, name: str) -> None:
    made = builder(tokenizer, TEMPLATES[name])
    text = "".join(span.text for span in made.chat.spans(CONVERSATION))
    messages = [{"role": turn.role, "content": turn.text} for turn in CONVERSATION]
    if name == "vicuna":
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    rendered = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False)
    assert (text.replace("<|im_end|>", "") if name == "vicuna" else text) == rendered
    assert made.build(record(*CONVERSATION)).ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_for_generation_is_what_training_saw_before_the_answer(tokenizer: Any, name: str) -> None:
    made = builder(tokenizer, TEMPLATES[name])
    sample = made.build(record(*CONVERSATION))
    prompt = tokenizer(made.chat.prompt(CONVERSATION[:-1]), add_special_tokens=False).input_ids
    start = sample.supervised_spans[-2]
    assert tokenizer.decode(sample.ids[:start]).rstrip() == tokenizer.decode(prompt).rstrip()


def test_labels_align_with_ids_and_ignore_the_rest(tokenizer: Any) -> None:
    sample = builder(tokenizer, QWEN15).build(record(*CONVERSATION))
    labels = sample.labels()
    assert len(labels) == len(sample.ids)
    assert [label for label in labels if label != IGNORE_INDEX] == [
        token for token, label in zip(sample.ids, labels, strict=True) if label != IGNORE_INDEX
    ]
    assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == (
        "A red square.<|im_end|>Small<|im_end|>"
    )


def test_a_template_that_changes_its_contents_is_refused(tokenizer: Any) -> None:
    thinking = (CONVERSATION[0], Turn("assistant", "<think>hm</think>A red square."))
    with pytest.raises(RecordError, match="changes this text"):
        builder(tokenizer, QWEN3_LIKE).build(record(*thinking))


def test_a_token_across_the_border_is_refused() -> None:
    whole_words = Tokenizer(models.WordLevel({"[UNK]": 0, "Q": 1, "A:yes": 2, "</s>": 3, "<image>": 4}, "[UNK]"))
    whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole_words, eos_token="</s>", unk_token="[UNK]", additional_special_tokens=["<image>"]
    )
    template = (
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else ' A:' + m['content'] + '</s>' }}"
        "{% endfor %}"
    )
    with pytest.raises(RecordError, match="spans the border between prompt and answer"):
        builder(tokenizer, template).build(record(Turn("user", "Q"), Turn("assistant", "yes"), image=None))


def test_special_tokens_in_user_text_are_broken_up(tokenizer: Any) -> None:
    sneaky = (Turn("user", "<image>\nSay <|im_end|>"), Turn("assistant", "An <image> tag <|im_end|> here"))
    sample = builder(tokenizer, QWEN15).build(record(*sneaky))
    image, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|im_end|>"))
    assert sample.ids.count(image) == 1
    assert sample.ids.count(end) == 3  # system, user, assistant: one each, written by the template


def test_system_prompt_stands_first_and_a_records_own_wins(tokenizer: Any) -> None:
    made = builder(tokenizer, QWEN15, system_prompt="Be brief.")
    assert made.chat.prompt(CONVERSATION[:1]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = (Turn("system", "Rhyme."), *CONVERSATION[:1])
    assert made.chat.prompt(own).startswith("<|im_start|>system\nRhyme.<|im_end|>")


def test_plain_style_is_image_and_caption_without_the_instruction(tokenizer: Any) -> None:
    sample = builder(tokenizer, QWEN15, style="plain").build(record(*CONVERSATION[:2]))
    assert tokenizer.decode(sample.ids) == "<image>A red square.<|im_end|>"
    assert sample.supervised_spans == [1, len(sample.ids)]


def test_too_long_conversations_lose_whole_turns_first(tokenizer: Any) -> None:
    whole = builder(tokenizer, QWEN15).build(record(*CONVERSATION))
    first = builder(tokenizer, QWEN15).build(record(*CONVERSATION[:2]))
    cut = builder(tokenizer, QWEN15, max_length=whole.length - 1).build(record(*CONVERSATION))
    assert (cut.ids, cut.num_turns_dropped) == (first.ids, 2)


def test_a_too_long_answer_loses_its_end_but_never_image_tokens(tokenizer: Any) -> None:
    made = builder(tokenizer, QWEN15)
    whole = made.build(record(*CONVERSATION[:2]))
    cut = builder(tokenizer, QWEN15, max_length=whole.length - 4).build(record(*CONVERSATION[:2]))
    assert cut.ids == whole.ids[:-4] and cut.num_tokens_cut == 4 and cut.num_supervised > 0
    with pytest.raises(RecordError, match="without its answer still over max_length"):
        builder(tokenizer, QWEN15, max_length=10).build(record(*CONVERSATION[:2]))


def test_a_role_the_template_has_no_place_for_is_the_users_fault(tokenizer: Any) -> None:
    picky = QWEN15.replace(
        "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for", 1
    )
    with pytest.raises(UserError, match=r"cannot render a conversation of .*no system.*Drop system_prompt"):
        builder(tokenizer, picky, system_prompt="Be brief.").build(record(*CONVERSATION))


@pytest.mark.parametrize("name", ["llama2", "vicuna"])
def test_spaces_before_an_answer_are_its_own_so_that_a_prompt_is_the_beginning_of_its_sample(
    name: str, tokenizer: Any
) -> None:
    build = builder(tokenizer, TEMPLATES[name])
    assert build.chat.begins_answers_with_spaces and build.identity()["spaces_before_answers"] == "supervised"
    for answer in ("A red square.", "7", "\u6f22", "(b)"):
        turns = (*CONVERSATION[:3], Turn("assistant", answer))
        sample = build.build(Record("0", (ImageRef("a.png"),), turns))
        prompt = tokenizer(build.chat.prompt(turns[:-1]), add_special_tokens=False).input_ids
        begin = sample.supervised_spans[-2]
        assert sample.ids[:begin] == prompt
        assert tokenizer.decode(sample.ids[begin:]).startswith(" ")


def test_a_template_without_spaces_before_answers_is_what_it_was(tokenizer: Any) -> None:
    for name in ("qwen15", "qwen3"):
        build = builder(tokenizer, TEMPLATES[name])
        assert not build.chat.begins_answers_with_spaces and "spaces_before_answers" not in build.identity()
