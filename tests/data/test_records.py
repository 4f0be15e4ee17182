"""Rows are parsed as published, and every fault names file, row and remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from llavaforge.data.records import Record, RecordError, Turn, find_data_file, parse_record, read_records
from llavaforge.errors import UserError

CC3M_ROW: dict[str, Any] = {
    "id": "GCC_train_002582585",
    "image": "GCC_train_002582585.jpg",
    "conversations": [
        {"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
        {"from": "gpt", "value": "olive oil is a healthy ingredient used liberally ."},
    ],
}


def row(**changes: Any) -> dict[str, Any]:
    return {**CC3M_ROW, **changes}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in pairs]


def test_a_row_of_cc3m() -> None:
    assert parse_record(CC3M_ROW, "chat.json row 7") == Record(
        where="chat.json row 7 (id 'GCC_train_002582585')",
        id="GCC_train_002582585",
        image="GCC_train_002582585.jpg",
        turns=(
            Turn("user", "Provide a brief description of the given image.\n<image>"),
            Turn("assistant", "olive oil is a healthy ingredient used liberally ."),
        ),
    )


def test_multi_turn_text_only_and_system_rows() -> None:
    several = turns(("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Colour?"), ("gpt", "Red."))
    assert len(parse_record(row(conversations=several), "x").turns) == 4
    text_only = {"conversations": turns(("system", "Be brief."), ("human", "Hello"), ("gpt", "Hi."))}
    assert parse_record(text_only, "x").image is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row(conversations=turns(("human", "What?"), ("gpt", "A cat."))), "exactly one `<image>`.*found 0"),
        (row(conversations=turns(("human", "<image><image>?"), ("gpt", "A"))), "exactly one `<image>`.*found 2"),
        (row(image=None), "`<image>` but no `image`"),
        (row(conversations=turns(("robot", "<image>"), ("gpt", "A"))), "unknown role 'robot'.*Allowed: human"),
        (row(conversations=turns(("human", "<image>"), ("gpt", "  "))), "answer in turn 1 is empty"),
        (row(conversations=turns(("human", "<image>"))), "end with gpt"),
        (row(conversations=[]), "non-empty list"),
        (row(image=["a.jpg", "b.jpg"]), "one file name"),
        (["not", "a", "mapping"], "a row is an object"),
    ],
)
def test_faulty_rows_are_named(broken: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(broken, "chat.json row 3")
    assert "chat.json row 3" in str(caught.value)


def test_all_faulty_rows_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([CC3M_ROW, row(image=None), row(conversations=[])]))
    with pytest.raises(UserError, match=r"2 of 3 records are faulty(.|\n)*row 1(.|\n)*row 2"):
        read_records(file)


def test_malformed_json_names_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text('[\n {"id": "a",}\n]')
    with pytest.raises(UserError, match=r"chat\.json:2:\d+: malformed JSON"):
        read_records(file)
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(CC3M_ROW) + "\n" + '{"id": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2:\d+: malformed JSON"):
        read_records(lines)


def test_json_lines_give_the_same_records_as_a_list(tmp_path: Path) -> None:
    rows = [CC3M_ROW, row(id="b")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    as_list, as_lines = read_records(tmp_path / "a.json"), read_records(tmp_path / "a.jsonl")
    assert [record.turns for record in as_list] == [record.turns for record in as_lines]
    assert as_lines[1].where.startswith("a.jsonl:2")


def test_a_folder_without_chat_json_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat.json in this folder"):
        find_data_file(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        find_data_file(tmp_path / "absent")
