"""The preview shows what training sees. Its page is looked at in a real browser, where there is one."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from llavaforge.cli import main
from llavaforge.config.schema import DataPreviewConfig
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.load.loader import PackDataset
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data_preview.preview import data_preview
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel
from llavaforge.training.run import train
from train_tools import open_packs, train_config

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

PLAIN = (200, 40, 120)  # the colour of plain.png, which cropping and resizing leave alone
SUPERVISED = {"light": (0xB7, 0xEB, 0xC1), "dark": (0x1F, 0x5A, 0x30)}  # --good of report/style.css
HOSTILE = '<script>alert(1)</script></span></div> "onmouseover=alert(2) <img src=x onerror=alert(3)>'
ARABIC = "العربية لغة جميلة جدا"


def record(id_: str, images: list[str], question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id_, "conversations": turns, **({"image": images} if images else {})}


RECORDS = [
    record("plain", ["plain.png"], "<image>\nWhat colour is it?", "A kind of red, naïve 😀.\n\tThat is all."),
    record(HOSTILE, ["plain.png"], f"<image>\n{HOSTILE}", HOSTILE),
    record("two", ["plain.png", "wide.png"], "<image> and <image>\nDo they differ?", "Yes."),
    record("cut", ["cut.png", "wide.png"], "<image><image>\nWhat is broken?", "The first."),
    record("long", [], "w" * 600, "https://example.org/" + "a/" * 200),
    record("arabic", [], f"{ARABIC}?", f"{ARABIC}\n\u202eturned"),
    record("empty", [], "Why?", ""),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview") / "data"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (60, 40), PLAIN).save(folder / "images" / "plain.png")
    noise = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "wide.png")
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "wide.png").read_bytes()[:2000])
    (folder / "chat.json").write_text(json.dumps(RECORDS))
    return folder


@pytest.fixture(scope="module")
def page(data: Path, tiny_llava: Path) -> Path:
    """A page of all samples: four per step, at most two in a micro-batch."""
    output = data.parent / "page" / "preview.html"
    result = data_preview(config(data, tiny_llava, output=output))
    assert result == {"output": str(output), "num_samples": 6}
    return output


def config(data_path: Path | None, model: Path, **options: Any) -> DataPreviewConfig:
    values = {"data_path": data_path, "model_name_or_path": str(model)}
    sizes = {"global_batch_size": 4, "per_device_train_batch_size": 2}
    return DataPreviewConfig.model_validate({**values, **sizes, **options})


@dataclass
class Element:
    """An element of a page, with all the text below it."""

    tag: str
    attributes: dict[str, str]
    children: "list[Element]" = field(default_factory=list)
    text: str = ""

    def find(self, name: str) -> "list[Element]":
        """All elements below with this tag or class."""
        here = [c for c in self.children if name == c.tag or name in c.attributes.get("class", "").split()]
        return here + [found for child in self.children for found in child.find(name)]


class Tree(HTMLParser):
    """A page as elements."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data


def ids_of(token: Element) -> list[int]:
    """The ids in a token's tooltip, each image token written once."""
    return [int(number) for number in token.attributes["title"].split(",")[0].split()[1:]]


def rows_of_cards(root: Element, index: SampleIndex) -> list[tuple[Element, int]]:
    """Each card with the number of its sample, found by the record's row."""
    numbers = {index.row(number).number: number for number in range(len(index))}
    cards = []
    for card in root.find("sample"):
        row = re.search(r"chat\.json row (\d+)", card.find("about")[0].text)
        assert row is not None
        cards.append((card, numbers[int(row.group(1))]))
    return cards


@pytest.fixture(scope="module")
def index(data: Path, tiny_llava: Path, loaded_llava: LoadedModel) -> SampleIndex:
    options = config(data, tiny_llava)
    return open_index(options.entries, loaded_llava.processor, loaded_llava.num_image_tokens, options)


def test_tokens_are_those_of_the_index(page: Path, index: SampleIndex, loaded_llava: LoadedModel) -> None:
    cards = rows_of_cards(Tree(page.read_text()).root, index)
    assert sorted(number for _, number in cards) == list(range(6))
    for card, number in cards:
        row = index.row(number)
        tokens = card.find("conversation")[0].children
        assert [id_ for token in tokens for id_ in ids_of(token)] == row.ids.tolist()
        marked = [id_ for token in tokens if "supervised" in token.attributes["class"] for id_ in ids_of(token)]
        borders = row.supervised_spans.tolist()
        expected = [id_ for a, b in zip(borders[::2], borders[1::2], strict=True) for id_ in row.ids[a:b].tolist()]
        assert marked == expected != []
        text = loaded_llava.processor.tokenizer.decode(row.ids).replace("\u202e", "")  # shown as a sign
        assert card.find("conversation")[0].text == text.replace("<image>", "<image> \u00d7 4")
        chips = [token for token in tokens if token.attributes["class"] == "chip"]
        assert [chip.text for chip in chips] == ["<image> \u00d7 4"] * len(row.images)


def test_text_of_the_data_stays_text(page: Path) -> None:
    root = Tree(page.read_text()).root
    (card,) = [card for card in root.find("sample") if HOSTILE in card.find("h3")[0].text]
    assert card.find("conversation")[0].text.count(HOSTILE) == 2
    for element in [*root.find("span"), *root.find("img"), *root.find("a"), *root.find("i")]:
        assert not [name for name in element.attributes if name.startswith("on")]
    assert not root.find("script")
    links = [element.attributes["href"] for element in [*root.find("a"), *root.find("link")]]
    sources = [image.attributes["src"] for image in root.find("img")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in root.find("style")[0].text
    assert "@import" not in root.find("style")[0].text


def test_bars_hold_every_token_of_their_micro_batch(page: Path, index: SampleIndex) -> None:
    root = Tree(page.read_text()).root
    numbers = {f"#{card.attributes['id']}": number for card, number in rows_of_cards(root, index)}
    micro_batches = root.find("micro-batch")
    assert [bar.attributes["id"] for bar in micro_batches] == ["bar-1-1", "bar-1-2", "bar-2-1", "bar-2-2"]
    full_width = int(re.findall(r"full width is ([\d,]+) tokens", root.text)[0].replace(",", ""))
    for bar in micro_batches:
        segments = bar.find("segment")
        samples = [numbers[segment.attributes["href"]] for segment in segments]
        assert [int(segment.attributes["data-tokens"]) for segment in segments] == index.lengths[samples].tolist()
        said = [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", bar.find("p")[0].text)]
        assert said[1:] == [
            len(samples), index.lengths[samples].sum(), 4 * index.num_images[samples].sum(),
            index.num_supervised[samples].sum(),
        ]  # fmt: skip
        widths = [float(segment.attributes["style"].removeprefix("width: ").rstrip("%")) for segment in segments]
        assert sum(widths) == pytest.approx(100 * said[2] / full_width, abs=0.01)
        for segment in segments:
            parts = [float(part.attributes["style"].removeprefix("width: ").rstrip("%")) for part in segment.find("i")]
            assert sum(parts) == pytest.approx(100, abs=0.01)


def test_samples_come_in_the_order_of_training(
    tiny_llava: Path, loaded_llava: LoadedModel, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, ...]] = []
    read = PackDataset.__getitem__

    def spy(self: PackDataset, source: MicroBatch) -> Any:
        trained.append(source.samples)
        return read(self, source)

    monkeypatch.setattr(PackDataset, "__getitem__", spy)
    options = {"global_batch_size": 6, "per_device_train_batch_size": 2, "seed": 5, "validation_split": 4}
    run = train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=2, train_type="use_lora", **options)
    train(run)
    output = tmp_path / "preview.html"
    data_preview(config(shapes / "train", tiny_llava, output=output, num_samples=12, **options))
    root = Tree(output.read_text()).root
    index, _ = open_packs(loaded_llava, run)
    numbers = {f"#{card.attributes['id']}": number for card, number in rows_of_cards(root, index)}
    bars = [
        [numbers[segment.attributes["href"]] for segment in bar.find("segment")] for bar in root.find("micro-batch")
    ]
    assert [len(bar) for bar in bars] == [len(samples) for samples in trained[:6]] == [2] * 6
    for step in (slice(0, 3), slice(3, 6)):  # what learns has a say in which of a step's samples share a micro-batch
        assert sorted(chain(*bars[step])) == sorted(chain(*trained[step]))
    assert "36 (and 4 held out)" in root.find("facts")[0].text


def test_pictures_are_the_pixels_of_training_and_a_broken_one_says_so(
    page: Path, index: SampleIndex, loaded_llava: LoadedModel
) -> None:
    dataset = PackDataset(index, loaded_llava.preprocessing, loaded_llava.image_token_id, loaded_llava.num_image_tokens)
    for card, number in rows_of_cards(Tree(page.read_text()).root, index):
        row, images = index.row(number), card.find("img")
        if row.id == "cut":
            (notice,) = card.find("notice")
            assert "cut.png: cannot be decoded" in notice.text
            assert "Traceback" not in notice.text
            row = row._replace(images=row.images[1:])
        assert len(images) == len(row.images)
        for image, expected_CHW in zip(images, dataset.pixels(row), strict=True):
            with urlopen(image.attributes["src"]) as file:
                found_HWC = np.asarray(Image.open(io.BytesIO(file.read())))
            assert np.array_equal(found_HWC.transpose(2, 0, 1), expected_CHW)


def test_faults_are_counted_and_named(page: Path) -> None:
    (notice,) = [notice for notice in Tree(page.read_text()).root.find("notice") if notice.attributes.get("id")]
    assert "1 faulty record is not shown" in notice.text
    assert "llavaforge data check" in notice.text
    assert "chat.json row 6 (id 'empty')" in notice.text


def test_the_terminal_shows_supervised_text_and_packing(
    data: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data_path", data, "--model_name_or_path", tiny_llava, "--max_tokens_per_batch", 1200]
    assert main(["data", "preview", *map(str, arguments), "--global_batch_size=6"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {"output": None, "num_samples": 6}
    assert "1 faulty record;" in out
    assert out.count("[[") == out.count("]]") == 3  # no more samples than that in full
    assert re.search(r"\[\[.*<\|im_end\|>\]\]", out)
    assert "<image> x 4" in out
    assert "\u202e" not in out
    bars = [line for line in out.splitlines() if re.match(r" +1\.\d ", line)]
    tokens = [int(re.findall(r"([\d,]+) tokens", bar)[0].replace(",", "")) for bar in bars]
    cells = [len(re.findall("[▓░█│]", bar)) for bar in bars]
    assert len(bars) > 1
    assert cells == [pytest.approx(67 * number / 1200, abs=1) for number in tokens]


def test_a_mixture_names_the_data_set_of_each_sample(
    data: Path, shapes: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    entries = [{"path": data, "repeat": 3}, {"path": shapes / "train", "max_samples": 6}]
    output = tmp_path / "mix.html"
    result = data_preview(config(None, tiny_llava, data=entries, output=output, num_samples=100))
    root = Tree(output.read_text()).root
    named = [card.find("about")[0].text.split(", chat.json")[0] for card in root.find("sample")]
    assert {name: named.count(name) for name in named} == {str(data): 6, str(shapes / "train"): 6}
    assert result["num_samples"] == 12  # repeated ones are shown once
    assert len(root.find("segment")) == 24
    assert [[cell.text for cell in row.children] for row in root.find("tbody")[0].children][1][:3] == [
        str(shapes / "train"), "6", "6",
    ]  # fmt: skip


def test_bad_input_is_told(data: Path, tiny_llava: Path, tmp_path: Path) -> None:
    only_bad = tmp_path / "bad.json"
    only_bad.write_text(json.dumps(RECORDS[-1:]))
    with pytest.raises(UserError, match=r"no sound record.*row 0 \(id 'empty'\)"):
        data_preview(config(only_bad, tiny_llava))
    with pytest.raises(UserError, match=r"is a folder. Name a file"):
        data_preview(config(data, tiny_llava, output=tmp_path))


MEASURE = """<script>
const sides = r => [r.left, r.top, r.right, r.bottom]
const box = e => sides(e.getClientRects()[0] || e.getBoundingClientRect())
const all = (selector, f) => [...document.querySelectorAll(selector)].map(f)
const found = {
  innerWidth, scrollWidth: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  right: Math.max(...all("body *:not(.scroll *):not(.conversation *)", e => e.getBoundingClientRect().right)),
  images: all("img", e => [e.title, box(e)]),
  tokens: all(".sample .token", e => ({
    supervised: e.classList.contains("supervised"), box: box(e), inside: box(e.parentNode),
    odd: [...e.parentNode.children].indexOf(e) % 2 == 0,
  })),
  segments: all(".segment", e => [Number(e.dataset.tokens), e.getBoundingClientRect().width]),
}
document.body.innerHTML = ""
document.body.dataset.found = JSON.stringify(found)
</script>"""


class Browser:
    """A headless Chromium without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, page: Path, *options: str) -> tuple[str, list[str]]:
        """Open a page; return its DOM and the messages of its console."""
        command = [
            CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars", "--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--disable-background-networking", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=1000",
            f"--user-data-dir={self.folder / 'profile'}", *options, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=300, text=True, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def measure(self, page: Path, width: int) -> dict[str, Any]:
        """Return positions and sizes in a copy of the page that a script measures."""
        copy = self.folder / "measured.html"
        without_policy = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
        copy.write_text(without_policy.replace("</body>", f"{MEASURE}</body>"))
        dom, _ = self(copy, "--dump-dom", f"--window-size={width},900")
        (body,) = Tree(dom).root.find("body")
        return dict(json.loads(body.attributes["data-found"]))

    def shoot(self, page: Path, width: int, height: int, is_dark: bool) -> np.ndarray:
        """Return a picture of the page, (H, W, 3)."""
        file = self.folder / "shot.png"
        dark = ["--blink-settings=preferredColorScheme=0"] if is_dark else []
        _, console = self(page, f"--screenshot={file}", f"--window-size={width},{height}", *dark)
        assert console == []
        return np.asarray(Image.open(file).convert("RGB"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def measured(page: Path, browser: Browser) -> dict[int, dict[str, Any]]:
    """Places and sizes by width of the window."""
    return {width: browser.measure(page, width) for width in (1000, 500)}


@needs_browser
def test_a_browser_finds_the_page_as_it_was_written_and_has_no_complaint(page: Path, browser: Browser) -> None:
    dom, console = browser(page, "--dump-dom")
    assert console == []
    written, read = Tree(page.read_text()).root, Tree(dom).root
    for name in ("token", "chip", "segment", "sample", "img", "i"):
        assert [(e.attributes, e.text) for e in read.find(name)] == [(e.attributes, e.text) for e in written.find(name)]
    assert not read.find("script")


@needs_browser
def test_a_script_would_not_run(page: Path, browser: Browser) -> None:
    copy = browser.folder / "with_script.html"
    copy.write_text(page.read_text().replace("</body>", "<script>document.body.innerHTML = ''</script></body>"))
    dom, console = browser(copy, "--dump-dom")
    assert "Content Security Policy" in " ".join(console)
    assert len(Tree(dom).root.find("sample")) == 6


@needs_browser
@pytest.mark.parametrize("width", [1000, 500])
def test_nothing_sticks_out(measured: dict[int, dict[str, Any]], width: int) -> None:
    found = measured[width]
    assert found["innerWidth"] == width
    assert found["scrollWidth"] <= width
    assert found["right"] <= width
    most = max(tokens for tokens, _ in found["segments"])
    scale = next(pixels / tokens for tokens, pixels in found["segments"] if tokens == most)
    for tokens, pixels in found["segments"]:
        assert pixels == pytest.approx(tokens * scale, abs=2)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_of_the_page_holds_image_and_colours(
    page: Path, browser: Browser, measured: dict[int, dict[str, Any]], scheme: str
) -> None:
    found = measured[1000]
    shot = browser.shoot(page, 1000, found["height"], scheme == "dark")
    assert (shot[2, 2].mean() < 50) == (scheme == "dark")
    for name, box in found["images"]:
        mean = cut(shot, box).reshape(-1, 3).mean(axis=0)
        assert (np.abs(mean - PLAIN).max() < 3) == (name == "plain.png"), (name, mean)
    is_supervised = (shot == SUPERVISED[scheme]).all(axis=-1)
    visible = [token for token in found["tokens"] if token["box"][3] <= token["inside"][3]]
    shares = [(float(cut(is_supervised, token["box"]).mean()), token) for token in visible]
    assert all(share > 0.3 for share, token in shares if token["supervised"] and token["odd"])
    assert all(share < 0.01 for share, token in shares if not token["supervised"])
    assert sum(token["supervised"] for token in visible) > 100


def cut(picture: np.ndarray, box: list[float]) -> np.ndarray:
    left, top, right, bottom = (round(side) for side in box)
    return picture[top:bottom, left:right]
