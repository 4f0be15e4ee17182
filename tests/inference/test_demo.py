"""The page is used as a person uses it: by the real verb, in a real browser, where there is one.

With LLAVAFORGE_QUICKSTART=FOLDER (of `llavaforge quickstart`) its models are shown, and the README's picture is made.
"""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from llavaforge.answers.generate import Answerer
from llavaforge.cli import main
from llavaforge.config.schema import CustomizeModelConfig, DemoConfig
from llavaforge.errors import UserError
from llavaforge.inference.conversation import Conversation, open_answerer
from llavaforge.inference.demo.samples import HeldOut, held_out
from llavaforge.inference.demo.sessions import Models
from llavaforge.join.parts import customize_model

CHROMIUM = shutil.which("chromium")
QUICKSTART = os.environ.get("LLAVAFORGE_QUICKSTART")
NUM_NEW_TOKENS = 12
HTML = "<img src=x onerror=\"document.title = 'it ran'\"> **bold** <b>b</b>?"


def png(colour: str, size: tuple[int, int] = (60, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def answerer_of(model: Path, max_new_tokens: int = NUM_NEW_TOKENS, temperature: float = 0.0) -> Answerer:
    return open_answerer(str(model), None, None, max_new_tokens, temperature)


@pytest.fixture(scope="module")
def other_llava(tiny_clip: Path, tiny_lm: "object", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_llava`, with another projector."""
    folder = tmp_path_factory.mktemp("other") / "llava"
    parts = dict(vision_tower=str(tiny_clip), language_model=str(tiny_lm("qwen2")))  # type: ignore[operator]
    customize_model(CustomizeModelConfig(**parts, output_dir=folder, seed=5))
    return folder


@dataclass
class Demo:
    """A running demo."""

    process: subprocess.Popen[str]
    address: str
    models: list[Path]
    samples: list[HeldOut]
    temporary: Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def demo(tiny_llava: Path, other_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    pytest.importorskip("gradio", reason="needs gradio: make test-demo")
    models, data = [tiny_llava, other_llava], shapes / "heldout" / "questions.json"
    if QUICKSTART:
        models = [Path(QUICKSTART) / "train" / stage / "final" for stage in ("stage-2-use_lora", "stage-1-projector")]
        data = Path(QUICKSTART) / "data" / "heldout" / "questions.json"
    samples = held_out(DemoConfig(model_name_or_path="", eval_data_path=data, num_samples=8))
    temporary, address = tmp_path_factory.mktemp("uploads"), f"http://127.0.0.1:{(port := free_port())}/"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "llavaforge", "demo", "--port", str(port), "--max_upload_mb", "1"),
            *("--model_name_or_path", str(models[0]), "--compare_with", str(models[1]), "--eval_data_path", str(data)),
            *("--num_samples", "8", "--max_new_tokens", str(NUM_NEW_TOKENS)),
        ],
        # A proxy that is not there, and a folder that the environment would open to everybody.
        env=os.environ
        | {"TMPDIR": str(temporary), "GRADIO_ALLOWED_PATHS": str(tiny_llava), "HTTP_PROXY": "http://127.0.0.1:9"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("Open "):
            break
    assert lines and f"Open {address} in a browser" in lines[-1], lines
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield Demo(process, address, models, samples, temporary)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-demo")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


class Page:
    """An open page, with what a person does on it."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.asked: list[str] = []
        self.complaints: list[str] = []
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        tab.set_default_timeout(20_000)

    def upload(self, content: bytes, name: str = "picture.png") -> None:
        if self.tab.locator("#image button[aria-label='Remove Image']").count():
            self.tab.click("#image button[aria-label='Remove Image']")
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.tab.set_input_files("#image input[type=file]", file)

    def shows_image(self) -> None:
        self.tab.wait_for_selector("#image img")

    def begin(self, question: str) -> None:
        self.tab.fill("#question textarea", question)
        self.tab.click("#ask")

    def ask(self, question: str) -> list[str]:
        """Ask and wait for the answers to end; return the newest of each model."""
        self.begin(question)
        self.tab.wait_for_function("document.querySelector('#question textarea').value == ''")
        self.tab.wait_for_selector("#ask")
        self.tab.wait_for_selector("#stop", state="hidden")
        return [self.texts(number)[-1] for number in range(2)]

    def texts(self, number: int) -> list[str]:
        return [text.strip() for text in self.tab.locator(f"#chat-{number} .message-content").all_inner_texts()]


@contextmanager
def opened(chromium: Any, address: str) -> Iterator[Page]:
    tab = chromium.new_page(viewport={"width": 1240, "height": 700})
    page = Page(tab)
    tab.goto(address)
    tab.wait_for_selector("#question textarea")
    yield page
    tab.close()


@pytest.fixture
def page(demo: Demo, chromium: Any) -> Iterator[Page]:
    with opened(chromium, demo.address) as page:
        yield page


def test_an_uploaded_image_is_asked_about_and_both_models_answer(demo: Demo, page: Page) -> None:
    pictures = [png("red"), png("blue")]
    questions = ["What is this?", "And what else?"]
    expected = []
    for model in demo.models:
        for picture in pictures:  # a new image begins a new conversation
            conversation = Conversation(answerer_of(model))
            conversation.show(picture, "picture")
            expected.append([conversation.ask(question).split() for question in questions])
    found = []
    for picture in pictures:
        page.upload(picture)
        page.shows_image()
        found.append([page.ask(question) for question in questions])
        assert page.texts(0)[::2] == questions
    for number in range(2):
        assert [[answers[number].split() for answers in both] for both in found] == expected[
            2 * number : 2 * number + 2
        ]
    assert all(url.startswith((demo.address, "data:", "blob:")) for url in page.asked)
    assert not page.complaints


def test_a_held_out_sample_is_chosen_with_its_question_and_answer(demo: Demo, page: Page, tmp_path: Path) -> None:
    tab = page.tab
    assert tab.locator("#samples img").count() == len(demo.samples) == 8
    for number in (3, 1):
        sample = demo.samples[number]
        tab.locator("#samples img").nth(number).click()
        tab.wait_for_function(f"document.querySelector('#question textarea').value == {sample.question!r}")
        assert tab.input_value("#reference textarea") == sample.answer
        page.shows_image()
        answers = page.ask(sample.question)
        for model, answer in zip(demo.models, answers, strict=True):
            conversation = Conversation(answerer_of(model))
            conversation.show(sample.image, "sample")
            assert conversation.ask(sample.question).split() == answer.split()
    page.ask("What colour is the diamond?")
    picture = Path(__file__).parents[2] / "docs" / "demo.png" if QUICKSTART else tmp_path / "demo.png"
    tab.mouse.move(5, 5)
    tab.screenshot(path=picture)
    with Image.open(picture) as shot:
        assert shot.size == (1240, 700) and len(shot.convert("RGB").getcolors(2**24) or []) > 100
    tab.click("#clear")
    tab.wait_for_function("document.querySelectorAll('.message-content').length == 0")
    assert tab.locator("#image img").count() == 0 and not tab.locator("#reference textarea").is_visible()


def test_texts_are_shown_as_they_are(page: Page) -> None:
    page.ask(HTML)
    assert page.texts(0)[0] == HTML
    assert page.tab.locator(".message-content img, .message-content b, .message-content strong").count() == 0
    assert page.tab.title() == "llavaforge demo"


def test_a_mistake_is_told_and_does_not_end_the_page(demo: Demo, page: Page) -> None:
    tab = page.tab
    page.upload(png("red")[:60])
    tab.wait_for_timeout(500)
    page.begin("What?")
    tab.wait_for_selector("text=cannot be decoded")
    assert "record" not in tab.locator(".toast-body").first.inner_text()
    assert tab.input_value("#question textarea") == "What?"
    tab.wait_for_selector("#ask")
    page.upload(os.urandom(1_100_000))
    tab.wait_for_selector("text=/maximum|exceeds|too large/i")
    page.upload(png("red"))
    page.shows_image()
    assert len(page.ask("What is this?")) == 2


@pytest.fixture
def endless(tiny_llava: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a page whose two models never end an answer by themselves."""
    pytest.importorskip("gradio", reason="needs gradio: make test-demo")
    from llavaforge.inference.demo.page import serving

    model = shutil.copytree(tiny_llava, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    settings["min_new_tokens"] = 1_000_000
    (model / "generation_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)  # sampled words have spaces between them
    models = Models(["endless", "next"], [answerer_of(model, 1_000_000, temperature=1.0)] * 2)
    with models, serving(models, [], DemoConfig(model_name_or_path="", port=free_port())) as address:
        yield address


def wait_for_answer(page: Page, number: int) -> None:
    """Wait until the first words of an answer of the first model are there."""
    page.tab.wait_for_function(
        "n => { const bots = document.querySelectorAll('#chat-0 .bot.message');"
        " return bots.length == n && bots[n - 1].innerText.trim().length > 3 }",
        arg=number,
    )


def test_an_answer_appears_as_it_is_made_until_it_is_stopped(endless: str, chromium: Any) -> None:
    with opened(chromium, endless) as page:
        for num_answers in (1, 2):
            page.begin("What?")
            wait_for_answer(page, num_answers)
            assert page.tab.locator("#ask").is_hidden() and page.tab.locator("#clear").is_disabled()
            page.tab.click("#stop")
            page.tab.wait_for_selector("#ask")
            before = page.texts(0)
            page.tab.wait_for_timeout(300)
            assert page.texts(0) == before and len(before) == 2 * num_answers
            assert page.texts(1) == []  # whose turn did not come


def test_a_page_that_waits_for_another_shows_what_was_asked(endless: str, chromium: Any) -> None:
    with opened(chromium, endless) as first, opened(chromium, endless) as second:
        first.begin("First?")
        wait_for_answer(first, 1)
        second.begin("Second?")
        second.tab.wait_for_selector("#chat-0 .user.message")
        assert second.texts(0) == ["Second?"] and second.tab.locator("#stop").is_visible()
        first.tab.click("#stop")
        wait_for_answer(second, 1)
        second.tab.click("#stop")
        second.tab.wait_for_selector("#ask")


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", "model"])
def test_no_file_of_the_machine_is_given_away(path: str, demo: Demo) -> None:
    file = demo.models[0] / "README.md" if path == "model" else Path(path)
    for door in ("gradio_api/file=", "file="):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{demo.address}{door}{file.absolute()}", timeout=20)
        assert refused.value.code in (403, 404)


def test_the_end_leaves_no_upload(demo: Demo) -> None:  # the last one of `demo`
    assert any(demo.temporary.rglob("*.png"))
    demo.process.send_signal(signal.SIGTERM)
    assert demo.process.wait(timeout=60) == 0
    assert not any(demo.temporary.rglob("*.png"))


def test_a_stopped_answer_is_the_beginning_of_the_whole_and_is_remembered(tiny_llava: Path) -> None:
    conversation = Conversation(answerer_of(tiny_llava, 60))
    num_asked = iter(range(60))
    stopped = conversation.ask("What?", is_stopped=lambda: next(num_asked) == 9)
    assert stopped == Conversation(answerer_of(tiny_llava, 10)).ask("What?") != ""
    assert conversation.turns[-1].text == stopped


def test_a_page_that_is_closed_ends_its_answer(tiny_llava: Path) -> None:
    with Models(["one"], [answerer_of(tiny_llava, 1_000_000)]) as models:
        answer = models.answer(models.session("page"), 0, "What?")
        next(answer)
        models.close("page")
        assert len(list(answer)) < 1000  # of a million tokens


def test_samples_have_an_image_each_and_a_broken_one_is_passed_over(shapes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shapes / "heldout", tmp_path / "heldout")
    config = DemoConfig(model_name_or_path="", eval_data_path=copy / "questions.json", num_samples=5)
    before = held_out(config)
    assert len({sample.image for sample in before}) == 5 and all(s.question and s.answer for s in before)
    next(path for path in (copy / "images").iterdir() if path.read_bytes() == before[0].image).write_bytes(b"broken")
    assert held_out(config)[:4] == before[1:]
    for path in (copy / "images").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of its first 1000 records is sound"):
        held_out(config)


def test_bad_input_is_told(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*options: str) -> str:
        assert main(["demo", "--port", str(free_port()), *options]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'llavaforge[demo]'" in told("--model_name_or_path", str(tiny_llava))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "no such folder" in told("--model_name_or_path", "not/a/model/here")
    assert "model_name_or_path" in told()
    assert "image_folder belongs to eval_data_path" in told("--model_name_or_path", "x", "--image_folder", "y")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = told("--model_name_or_path", str(tiny_llava), "--port", str(port))
        assert f"port {port} of 127.0.0.1 is in use. Give another --port" in message
    assert "Give a --host of this machine" in told("--model_name_or_path", str(tiny_llava), "--host", "192.0.2.1")
