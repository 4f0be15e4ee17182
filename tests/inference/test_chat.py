"""A session on the terminal: what is typed, what is answered, and that a mistake does not end it."""

import io
from pathlib import Path

import pytest
from PIL import Image

from llavaforge.answers.generate import Answerer, Question
from llavaforge.config.schema import ChatConfig, SampleOptions
from llavaforge.data.rows.turns import Turn
from llavaforge.device import compute_dtype
from llavaforge.inference.chat import chat
from llavaforge.model.attention import use_packed_attention
from llavaforge.model.load import load_model
from llavaforge.model.trainable import cast_parameters


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("my images")
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    return folder / "one.png", folder / "two.png"


def talk(
    lines: list[str], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    image: Path | None = None,
) -> tuple[list[str], str]:  # fmt: skip
    """Type lines; return the answers and what stood beside them."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat(ChatConfig(model_name_or_path=str(model), image=image, max_new_tokens=6))
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_a_session_remembers_what_was_said_and_shown(
    tiny_llava: Path, images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["What?", "And why?", f"/image '{images[1]}'", "What of this?", "/reset", "What?"]
    answers, _ = talk(lines, tiny_llava, monkeypatch, capsys, images[0])
    loaded = load_model(str(tiny_llava))
    cast_parameters(loaded.model, compute_dtype("auto"))
    use_packed_attention(loaded.model)
    answerer = Answerer(loaded, SampleOptions(), 6)
    one, two = (loaded.preprocessing(Image.open(path)) for path in images)
    turns: list[Turn] = []
    for question, answer, pixels in zip(
        ("<image>\nWhat?", "And why?", "<image>\nWhat of this?"), answers, ([one], [one], [one, two]), strict=False
    ):
        turns.append(Turn("user", question))
        assert answerer([Question(tuple(turns), pixels)]) == [answer]
        turns.append(Turn("assistant", answer))
    assert answerer([Question((Turn("user", "What?"),))]) == answers[3:]


def test_a_mistake_does_not_end_a_session(
    tiny_llava: Path, images: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "broken.jpg").write_bytes(images[0].read_bytes()[:40])
    lines = [
        "/image nowhere.png",
        f"/image {tmp_path / 'broken.jpg'}",
        "/image a b",
        "/image 'a",
        "/quit",
        "<image> what?",
    ]
    answers, told = talk([*lines, "What?"], tiny_llava, monkeypatch, capsys)
    assert len(answers) == 1
    for words in ("nowhere.png: no such image", "broken.jpg", "'a b'", "unknown command /quit", "no new image for it"):
        assert words in told
    assert "record" not in told and "Traceback" not in told


def test_an_image_that_no_question_was_about_is_replaced(
    tiny_llava: Path, images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [f"/image '{path}'" for path in images]
    twice, _ = talk([*shown, "What?"], tiny_llava, monkeypatch, capsys)
    once, _ = talk([shown[1], "What?"], tiny_llava, monkeypatch, capsys)
    assert twice == once and len(once) == 1


def test_on_a_terminal_an_answer_appears_as_it_is_made(
    tiny_llava: Path, images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []
    whole, _ = talk(["What?"], tiny_llava, monkeypatch, capsys, images[0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("llavaforge.inference.chat._show", pieces.append)
    talk(["What?"], tiny_llava, monkeypatch, capsys, images[0])
    assert "".join(pieces).strip() == whole[0] and len(pieces) > 1
