"""Rows of every format become the same records, and every fault is told apart and says what is allowed."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavaforge.data.faults import KINDS, RecordError
from llavaforge.data.rows.formats import CAPTION_PROMPT, FORMATS
from llavaforge.data.rows.records import Record, parse_record
from llavaforge.data.rows.turns import Turn
from llavaforge.data.storage.image_ref import ImageRef

QUESTION = "Provide a brief description of the given image.\n<image>"
ANSWER = "olive oil is a healthy ingredient used liberally ."
CC3M_ROW: dict[str, Any] = {
    "id": "GCC_train_002582585",
    "image": "GCC_train_002582585.jpg",
    "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
}
IMAGE = {"type": "image_url", "image_url": {"url": "a.jpg"}}


def row(**changes: Any) -> dict[str, Any]:
    return {**CC3M_ROW, **changes}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in pairs]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def messages(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


def test_a_row_of_cc3m() -> None:
    assert parse_record(CC3M_ROW) == Record(
        id="GCC_train_002582585",
        images=(ImageRef("GCC_train_002582585.jpg"),),
        turns=(Turn("user", "<image>\nProvide a brief description of the given image."), Turn("assistant", ANSWER)),
    )


WANTED = Record(
    id="7",
    images=(ImageRef("a.jpg"), ImageRef("b.jpg")),
    turns=(
        Turn("system", "Be brief."),
        Turn("user", "<image>\n<image>\nWhat differs?"),
        Turn("assistant", "The cat."),
        Turn("user", "Which?"),
        Turn("assistant", "The red one."),
    ),
)
SPOKEN = [
    ("human", "<image>\n<image>\nWhat differs?"),
    ("gpt", "The cat."),
    ("human", "Which?"),
    ("gpt", "The red one."),
]
AS_MESSAGES = [("user", SPOKEN[0][1]), ("assistant", "The cat."), ("user", "Which?"), ("assistant", "The red one.")]
SAME = {
    "llava": {"id": 7, "image": ["a.jpg", "b.jpg"], "conversations": turns(("system", "Be brief."), *SPOKEN)},
    "sharegpt": {"id": "7", "images": ["a.jpg", "b.jpg"], "system": "Be brief.", "conversations": turns(*SPOKEN)},
    "messages, images beside": messages(("system", "Be brief."), *AS_MESSAGES, images=["a.jpg", "b.jpg"], id="7"),
    "messages, parts": messages(
        ("system", [text("Be brief.")]),
        ("user", [IMAGE, {"type": "image", "image": "b.jpg"}, text("What differs?")]),
        ("assistant", [text("The cat.")]),
        *AS_MESSAGES[2:],
        id="7",
    ),
    "messages, parts that mark places": messages(
        ("system", "Be brief."),
        ("user", [{"type": "image"}, {"type": "image"}, text("What differs?")]),
        *AS_MESSAGES[1:],
        images=["a.jpg", "b.jpg"],
        id="7",
    ),
    "parts as Arrow gives them": messages(
        ("system", [{"type": "text", "text": "Be brief.", "image": None}]),
        ("user", [{"type": "image", "text": None, "image": "a.jpg"}, {"type": "image", "text": None, "image": "b.jpg"},
                  {"type": "text", "text": "What differs?", "image": None}]),
        *AS_MESSAGES[1:],
        id="7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_record(name: str) -> None:
    assert parse_record(SAME[name]) == WANTED
    named = name.split(",")[0]
    if named in FORMATS:
        assert parse_record(SAME[name], named) == WANTED


def test_a_caption_gets_a_question() -> None:
    wanted = (Turn("user", f"<image>\n{CAPTION_PROMPT}"), Turn("assistant", "a cat"))
    for fields in ({"image": "a.jpg", "caption": "a cat"}, {"jpg": ImageRef("a.jpg"), "txt": "a cat\n"}):
        assert parse_record(fields).turns == wanted


def test_text_only_rows_have_no_image() -> None:
    text_only = {"conversations": turns(("system", "Be brief."), ("human", "Hello"), ("gpt", "Hi."))}
    assert parse_record(text_only).images == ()


def test_a_placeholder_that_is_text_stays_text_and_is_counted() -> None:
    record = parse_record(
        messages(("user", [IMAGE, text("What does <image> mean?")]), ("assistant", "<image> is a tag."))
    )
    assert record.turns[0].text == "<image>\nWhat does < image> mean?"
    assert record.num_literals == 2 and len(record.images) == 1


BROKEN: list[tuple[Any, str, str]] = [
    (row(conversations=turns(("human", "What?"), ("gpt", "A cat."))), "image_count", "exactly one `<image>`.*found 0"),
    (row(conversations=turns(("human", "<image><image>?"), ("gpt", "A"))), "image_count", "`<image>`.*found 2"),
    (row(image=None), "image_count", "`<image>` but no `image`"),
    (row(image=["a.jpg", "b.jpg"]), "image_count", r"2 image\(s\).*found 1"),
    (row(conversations=turns(("robot", "<image>"), ("gpt", "A"))), "unknown_role", "role 'robot'.*Allowed: human"),
    (row(conversations=turns(("human", "<image>"), ("gpt", "  "))), "empty_answer", "answer in turn 1 is empty"),
    (row(conversations=turns(("human", "<image>"))), "turn_order", "end with gpt"),
    (row(conversations=turns(("gpt", "A"), ("human", "<image>"))), "turn_order", "alternate"),
    (
        row(conversations=turns(("human", "<image>"), ("system", "x"), ("gpt", "A"))),
        "turn_order",
        "system turn may only come first",
    ),
    (row(conversations=[]), "malformed_row", "non-empty list"),
    (row(conversations=[{"from": "human"}]), "malformed_row", "text `value`"),
    (row(image={"a": 1}), "malformed_row", "an image is a file name"),
    (row(image=["a.jpg", None]), "malformed_row", "an image is a file name"),
    (row(image="https://example.com/a.jpg"), "remote_image", "Download it"),
    (messages(("user", [{"type": "audio"}]), ("assistant", "A")), "malformed_row", "content part"),
    (messages(("user", [{"type": "image"}]), ("assistant", "A")), "image_count", "names no image"),
    (messages(("user", [text("Hi")]), ("assistant", [IMAGE])), "malformed_row", "content part"),
    ({"caption": "a cat"}, "image_count", "one image, found 0"),
    ({"image": "a.jpg"}, "malformed_row", "`conversations`, `messages`.*found the fields image"),
    (["not", "a", "mapping"], "malformed_row", "a row is an object"),
    (row(images=["b.jpg"], image="a.jpg"), "malformed_row", "`images` and `image` name other images"),
    (row(system=5), "malformed_row", "`system` must be a text, found 5"),
    (messages(("user", "Hi"), ("assistant", "A")) | {"system": ["x"]}, "malformed_row", "`system` must be a text"),
]


@pytest.mark.parametrize(("broken", "kind", "message"), BROKEN, ids=range(len(BROKEN)))
def test_faulty_rows_are_told_apart(broken: Any, kind: str, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(broken)
    assert caught.value.kind == kind


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(RecordError, match="`messages` must be"):
        parse_record(CC3M_ROW, "messages")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(["human", "gpt", "user", "<image>"]) | ANYTHING
                  for key in ("from", "value", "role", "content", "type")}
)  # fmt: skip
ROW = ANYTHING | st.fixed_dictionaries(
    {},
    optional={
        "id": ANYTHING,
        "image": st.just("a.jpg") | ANYTHING,
        "images": st.lists(st.just("a.jpg") | ANYTHING, max_size=3),
        "conversations": st.lists(TURN | ANYTHING, max_size=4) | ANYTHING,
        "messages": st.lists(TURN | ANYTHING, max_size=4) | ANYTHING,
        "caption": ANYTHING,
        "system": ANYTHING,
    },
)


@settings(max_examples=200, deadline=None)
@given(ROW)
def test_a_malformed_row_never_crashes_and_never_passes_unnoticed(raw: Any) -> None:
    try:
        record = parse_record(raw)
    except RecordError as error:
        assert error.kind in KINDS and str(error)
        return
    spoken = [turn for turn in record.turns if turn.role != "system"]
    assert [turn.role for turn in spoken] == ["user", "assistant"] * (len(spoken) // 2) and spoken
    assert all(turn.text for turn in spoken if turn.role == "assistant")
    assert sum(turn.text.count("<image>") for turn in spoken if turn.role == "user") == len(record.images)


def test_the_same_image_by_two_fields_and_a_system_text_beside_messages_are_read() -> None:
    record = parse_record(row(image="a.jpg", images=["a.jpg"]))
    assert [image.name for image in record.images] == ["a.jpg"]
    record = parse_record(messages(("user", "Hi"), ("assistant", "A")) | {"system": "Be short."})
    assert record.turns[0] == ("system", "Be short.")
