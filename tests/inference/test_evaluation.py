"""What `evaluate` adds to its figures: likelihoods of choices, a page, several processes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llavaforge.answers.choices import candidates, options_of, right_choice
from llavaforge.config.schema import EvaluateConfig, SampleOptions
from llavaforge.data.index.open import sample_builder
from llavaforge.data.rows.records import parse_record
from llavaforge.errors import UserError
from llavaforge.inference.evaluate import evaluate
from llavaforge.model.load import load_model
from ranks import free_port, rank_environment
from train_tools import arguments_of, open_packs, pack_of, stock_log_likelihood, train_config
from warm import WarmProcess, command_line

QUESTION = "What is it?\nA. red\nB. a much longer option\nC. blue\nAnswer with the letter."


def rows_of(shapes: Path, question: str, answer: str, number: int = 3) -> list[dict[str, Any]]:
    images = sorted((shapes / "heldout" / "images").iterdir())[:number]
    return [
        {"id": f"row-{image.stem}", "image": image.name, "question": question, "answer": answer} for image in images
    ]


def data_of(folder: Path, shapes: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "images").symlink_to(shapes / "heldout" / "images")
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def config_of(model: Path, data: Path, output_dir: Path, **options: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{
            "model_name_or_path": str(model), "data_path": data, "output_dir": output_dir, "bf16": False,
            "dataloader_num_workers": 0, "max_new_tokens": 4, **options,
        }
    )  # fmt: skip


def lines_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ("B", ["A", "B", "C"]),
        ("(B)", ["(A)", "(B)", "(C)"]),
        ("B. a much longer option", ["A. red", "B. a much longer option", "C. blue"]),
        ("a much longer option", ["red", "a much longer option", "blue"]),
    ],
)
def test_options_are_answered_in_the_form_of_the_reference(own: str, others: list[str]) -> None:
    record = parse_record({"image": "a.png", "question": QUESTION, "answer": own})
    assert options_of(record) == {"A": "red", "B": "a much longer option", "C": "blue"}
    assert [one.turns[-1].text for one in candidates(record).values()] == others


def test_the_likeliest_option_is_the_stock_models(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    rows = rows_of(shapes, QUESTION, "B. a much longer option")
    data = data_of(tmp_path / "data", shapes, rows)
    stock = load_model(str(tiny_llava))
    _, dataset = open_packs(stock, train_config(tiny_llava, data, tmp_path))
    builder = sample_builder(stock.processor, stock.num_image_tokens, SampleOptions())
    expected = []
    for number, row in enumerate(rows):
        pixels = pack_of(dataset, number).pixels_ICHW
        values = {
            letter: stock_log_likelihood(stock, builder, one, pixels)
            for letter, one in candidates(parse_record(row)).items()
        }
        expected.append(max(values, key=lambda letter: values[letter]))
    found = evaluate(config_of(tiny_llava, data, tmp_path / "out", metrics=["multiple_choice_likelihood"]))
    lines = lines_of(tmp_path / "out")
    assert [line["likeliest_choice"] for line in lines] == expected
    assert found["multiple_choice_likelihood"] == expected.count("B") / 3  # type: ignore[typeddict-item]
    assert "answer" not in lines[0]  # nothing was generated
    for row in rows:  # the option's text instead of its letter
        row["answer"] = "a much longer option"
    texts = data_of(tmp_path / "texts", shapes, rows)
    found = evaluate(config_of(tiny_llava, texts, tmp_path / "out", metrics=["multiple_choice_likelihood"]))
    choices = [line["likeliest_choice"] for line in lines_of(tmp_path / "out")]
    assert found["multiple_choice_likelihood"] == choices.count("B") / 3  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        ("A. A dog\nB. A cat", "A cat", "B"),
        ("A. C\nB. K\nC. M", "A", "A"),
        ("A. red\nB. blue", "(B) blue", "B"),
        ("A. red\nB. blue", "green", ""),
        ("A. red\nB. blue", "D", ""),
    ],
)
def test_the_right_choice_is_told_by_text_or_letter(options: str, answer: str, right: str) -> None:
    record = parse_record({"image": "a.png", "question": f"What?\n{options}", "answer": answer})
    assert right_choice(record) == right
    if right:
        assert candidates(record)[right].turns[-1].text == answer
        assert len({one.turns[-1].text for one in candidates(record).values()}) == len(options_of(record))


def test_a_question_without_options_and_answers_that_are_missing_are_the_users(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    data = data_of(tmp_path / "data", shapes, rows_of(shapes, "What is it?", "B"))
    with pytest.raises(UserError, match=r"row-.* offers no options"):
        evaluate(config_of(tiny_llava, data, tmp_path / "out", metrics=["multiple_choice_likelihood"]))
    wrong = data_of(tmp_path / "wrong", shapes, rows_of(shapes, QUESTION, "D"))
    with pytest.raises(UserError, match="answer 'D' is none of its options"):
        evaluate(config_of(tiny_llava, wrong, tmp_path / "out", metrics=["multiple_choice_likelihood"]))
    with pytest.raises(UserError, match="has 1 reference"):
        evaluate(config_of(tiny_llava, data, tmp_path / "out", metrics=["vqa"]))


def test_rows_with_ten_answers_are_measured_by_all_of_them(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    rows = rows_of(shapes, "What is it?", "")
    for row in rows:
        del row["answer"]
        row["answers"] = [{"answer": "net", "answer_id": number} for number in range(6)] + ["netting"] * 4
    found = evaluate(config_of(tiny_llava, data_of(tmp_path / "data", shapes, rows), tmp_path / "out"))
    assert 0 <= found["vqa"] <= 1  # type: ignore[typeddict-item]  # `auto` takes it
    line = lines_of(tmp_path / "out")[0]
    assert line["reference"] == "net" and line["answers"] == ["net"] * 6 + ["netting"] * 4


def test_the_page_shows_the_worst_samples_with_their_images_and_asks_for_nothing(
    tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    rows = rows_of(shapes, "What <b>is</b> it?", "a reference", number=30)
    config = config_of(tiny_llava, data_of(tmp_path / "data", shapes, rows), tmp_path / "out")
    evaluate(config)
    evaluate(config)  # our own files are replaced
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in page and page.count('src="data:image/jpeg;base64,') == 24
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", page)]
    worst = sorted((line["loss"] for line in lines_of(tmp_path / "out")), reverse=True)[:24]
    assert losses == [pytest.approx(loss, abs=1e-3) for loss in worst]
    (tmp_path / "out" / "report.html").write_text("my own notes")
    with pytest.raises(UserError, match="llavaforge did not write it"):
        evaluate(config)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    config = config_of(tiny_llava, shapes / "heldout" / "questions.json", tmp_path / "one", max_samples=21)
    alone = evaluate(config)
    shared = config.model_copy(update={"output_dir": tmp_path / "two"})
    port = free_port()
    arguments = arguments_of(shared, verb="evaluate")
    ranks = [WarmProcess(command_line, arguments, env=rank_environment(rank, 2, port)) for rank in range(2)]
    told = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    together = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert together.keys() == alone.keys() and together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert (together["num_samples"], together["exact_match"]) == (alone["num_samples"], alone["exact_match"])
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert one | {"loss": 0} == two | {"loss": 0} and one["loss"] == pytest.approx(two["loss"], rel=1e-4)
