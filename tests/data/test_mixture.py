"""Mixtures: stated shares, every row equally often, the same order after a break; no image is on both sides."""

import io
import json
import random
import re
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from llavaforge.config.schema import DataEntry, DataOptions, SampleOptions, TrainConfig
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.data.load.pack import Pack
from llavaforge.data.order.mixture import Mixture, drop_quarantined, mix, split_held_out
from llavaforge.data.order.plan import Plan
from llavaforge.errors import StoppedEarly, UserError
from llavaforge.training.guards import Guards
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import train_config


def entries(*options: dict[str, Any]) -> list[DataEntry]:
    return [DataEntry.model_validate({"path": f"set{number}", **each}) for number, each in enumerate(options)]


def rows_of(*sizes: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    ends = np.cumsum([0, *sizes])
    return [np.arange(start, end) for start, end in pairwise(ends)]


def mixed(*options: dict[str, Any], sizes: tuple[int, ...], seed: int = 0) -> Mixture:
    return mix(entries(*options), rows_of(*sizes), seed)


def drawn(mixture: Mixture, epochs: int) -> Counter[int]:
    return Counter(row for epoch in range(epochs) for row in mixture.epoch(epoch).tolist())


# Shares.


def test_weights_give_shares_of_an_epoch_as_long_as_all_data() -> None:
    mixture = mixed({"weight": 3}, {"weight": 1}, sizes=(40, 160))
    assert mixture.draws == (150, 50) and len(mixture) == 200
    for epoch in range(3):
        assert len(mixture.epoch(epoch)) == 200 and np.sum(mixture.epoch(epoch) < 40) == 150


def test_repeats_give_multiples_of_each_data_set() -> None:
    mixture = mixed({"repeat": 0.3}, {"repeat": 1.5}, {}, {"repeat": 2}, sizes=(10, 10, 7, 5))
    assert mixture.draws == (3, 15, 7, 10)
    counts = np.bincount(mixture.epoch(4), minlength=32)
    assert [counts[rows].sum() for rows in mixture.rows] == [3, 15, 7, 10]
    assert set(counts[10:20]) == {1, 2} and set(counts[20:27]) == {1} and set(counts[27:]) == {2}


OPTIONS = st.one_of(
    st.fixed_dictionaries({}, optional={"repeat": st.sampled_from([0.3, 0.5, 1, 1.5, 2, 3.7])}),
    st.fixed_dictionaries({"repeat": st.floats(0.1, 5)}),
)


@settings(max_examples=60, deadline=None)
@given(options=st.lists(OPTIONS, min_size=1, max_size=3), size=st.integers(10, 30), epochs=st.integers(1, 12))
def test_over_the_epochs_every_row_comes_equally_often(options: list[dict[str, float]], size: int, epochs: int) -> None:
    mixture = mixed(*options, sizes=(size,) * len(options))
    counts = drawn(mixture, epochs)
    for rows, draws in zip(mixture.rows, mixture.draws, strict=True):
        mine = [counts[row] for row in rows.tolist()]
        assert sum(mine) == draws * epochs and max(mine) - min(mine) <= 1


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.1, 5.0)])
def test_over_the_epochs_every_row_comes_equally_often_by_weight(weights: tuple[float, float]) -> None:
    mixture = mixed(*({"weight": weight} for weight in weights), sizes=(23, 77))
    for epochs in (1, 2, 5, 17):
        counts = drawn(mixture, epochs)
        for rows in mixture.rows:
            mine = [counts[row] for row in rows.tolist()]
            assert max(mine) - min(mine) <= 1


def test_the_order_is_that_of_the_seed_alone() -> None:
    options, sizes = ({"weight": 3}, {"weight": 1}), (40, 160)
    one, same, other = (mixed(*options, sizes=sizes, seed=seed) for seed in (1, 1, 2))
    for epoch in (7, 0, 3):  # in any order of asking
        assert np.array_equal(one.epoch(epoch), mixed(*options, sizes=sizes, seed=1).epoch(epoch))
    for epoch in (0, 3, 7):
        assert np.array_equal(one.epoch(epoch), same.epoch(epoch))
        assert not np.array_equal(one.epoch(epoch), other.epoch(epoch))
    assert not np.array_equal(one.epoch(0), one.epoch(1))
    first_rows = [set(mixture.epoch(0).tolist()) for mixture in (one, other)]
    assert first_rows[0] != first_rows[1]  # of the larger set, too


def test_the_data_sets_are_mixed_throughout_an_epoch() -> None:
    epoch = mixed({}, {}, sizes=(500, 500)).epoch(0)
    halves = [np.mean(half < 500) for half in np.split(epoch, 2)]
    assert all(0.4 < share < 0.6 for share in halves)


def test_a_share_that_gives_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"set1: its weight or repeat gives it no sample in an epoch. Raise it"):
        mixed({"weight": 1000}, {"weight": 1}, sizes=(10, 10))
    with pytest.raises(
        UserError, match=r"set0: `repeat` makes an epoch of 10,000,000,010 samples; at most 1,000,000,000"
    ):
        mixed({"repeat": 1e9}, {}, sizes=(10, 10))
    with pytest.raises(UserError, match="set1: no records are left to train on"):
        mixed({}, {}, sizes=(10, 0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "every entry a weight, or none"),
        ([{"path": "a", "weight": 1, "repeat": 2}], "weight or repeat, not both"),
        ([{"path": "a", "weight": 0}], "greater than 0"),
        ([{"path": "a", "repeat": -1}], "greater than 0"),
        ([{"path": "a", "max_samples": 0}], "greater than 0"),
        ([{"path": "a", "wait": 1}], "Extra inputs"),
    ],
)
def test_entries_that_make_no_sense_are_refused(data: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataOptions.model_validate({"data": data})


def test_the_table_tells_the_realised_shares() -> None:
    options = ({"weight": 3}, {"weight": 1})
    mixture = mixed(*options, sizes=(40, 160))
    supervised = np.concatenate([np.full(40, 2), np.full(160, 10)])  # tokens: 150 * 2 of 150 * 2 + 50 * 10
    console = Console(file=io.StringIO(), width=120)
    console.print(mixture.table(entries(*options), supervised))
    lines = [re.split(r"\s*[│┃|]\s*", line.strip("│┃ ")) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [*map(str.strip, lines[3 + 1])] == ["set0", "40", "150", "75.0%", "37.5%"]
    assert [*map(str.strip, lines[4 + 1])] == ["set1", "160", "50", "25.0%", "62.5%"]


# The order over steps.


def plan(world_size: int, mixture: Mixture, num_steps: int) -> Plan:
    lengths = np.random.default_rng(1).integers(5, 40, int(mixture.all_rows.max()) + 1)
    return Plan(mixture, lengths, lengths // 2, lengths.astype(float) ** 2, 8, num_steps, world_size, 2, None)


def global_batches(made: Plan, start: int) -> list[list[int]]:
    """The samples of every step from `start` on, gathered from all ranks."""
    steps: dict[int, list[int]] = {step: [] for step in range(start, made.num_steps)}
    for rank in range(made.world_size):
        for batch in made.iterate(rank, start):
            steps[batch.step] += batch.samples
    return [sorted(samples) for samples in steps.values()]


@pytest.mark.parametrize(
    "options", [({"repeat": 0.3}, {"repeat": 1.5}, {}), ({"weight": 2}, {"weight": 5}, {"weight": 1})]
)
def test_a_mixture_of_three_goes_on_from_any_step_in_the_same_order(options: tuple[dict[str, float], ...]) -> None:
    def fresh() -> Mixture:
        return mixed(*options, sizes=(30, 14, 9), seed=5)

    num_steps = 25  # several epochs
    whole = global_batches(plan(1, fresh(), num_steps), 0)
    assert len(whole) * 8 > 2 * len(fresh())
    in_order = [batch.samples for batch in plan(2, fresh(), num_steps).iterate(1)]
    for start in (0, 1, 6, 7, 13, 24):
        for world_size in (1, 2, 4):
            assert global_batches(plan(world_size, fresh(), num_steps), start) == whole[start:]
        tail = [batch.samples for batch in plan(2, fresh(), num_steps).iterate(1, start)]
        assert tail == in_order[len(in_order) - len(tail) :]


# A real run.


@pytest.fixture(scope="module")
def three_sources(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The shapes as a folder, a zip with JSON lines, and Parquet."""
    root = tmp_path_factory.mktemp("three")
    rows = json.loads((shapes / "train" / "chat.json").read_text())
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for row in rows[:20]:
            archive.write(shapes / "train" / "images" / row["image"], row["image"])
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    embedded = [
        row | {"image": {"bytes": (shapes / "heldout" / "images" / row["image"]).read_bytes()}}
        for row in json.loads((shapes / "heldout" / "questions.json").read_text())[:12]
    ]
    pq.write_table(pa.Table.from_pylist(embedded), root / "questions.parquet", row_group_size=4)
    return [
        {"path": shapes / "train", "repeat": 0.3},
        {"path": root / "rows.jsonl", "max_samples": 15},
        {"path": root / "questions.parquet", "repeat": 1.5},
    ]


def test_a_mixture_of_three_stopped_and_resumed_equals_uninterrupted(
    three_sources: list[dict[str, Any]], tiny_llava: Path, shapes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    configs = [train_config(tiny_llava, shapes, tmp_path / name, max_steps=14) for name in ("whole", "broken")]
    mixture = {"data_path": None, "data": three_sources}
    whole, broken = (TrainConfig.model_validate(config.model_dump(exclude_unset=True) | mixture) for config in configs)
    train(whole)
    told = capsys.readouterr().err
    for path, numbers in (
        ("train", "40.*12.*26.7%"),
        ("rows.jsonl", "15.*15.*33.3%"),
        ("questions.parquet", "12.*18.*40.0%"),
    ):
        assert re.search(rf"{path}\b.*{numbers}", told)
    agree = Guards.agree

    def agree_or_stop(self: Guards, packs: list[Pack], fault: UserError | None, stop: Any) -> int:
        if self.state.step == 7:
            stop.exit_code = 75
        return agree(self, packs, fault, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Guards, "agree", agree_or_stop)
        with pytest.raises(StoppedEarly):
            train(broken)
    assert train(broken)["global_step"] == 14
    compared = ("step", "loss", "grad_norm", "num_supervised")
    lines = [read_metrics(tmp_path / name) for name in ("whole", "broken")]
    assert len(lines[0]) == 14
    for one, other in zip(*lines, strict=True):
        assert [one[name] for name in compared] == [other[name] for name in compared]
    models = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert models[0] == models[1]


# Holding out.


def data_set(folder: Path, images: list[list[str]], present: bool = True) -> Path:
    """Records with the given images each."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, names in enumerate(images):
        turns = [("human", "<image>" * len(names) + "Hi"), ("gpt", f"Record {number}.")]
        rows.append({"id": str(number), "images": names, "conversations": [{"from": r, "value": t} for r, t in turns]})
        for name in names if present else []:
            (folder / "images" / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / "images" / name).write_bytes(b"not looked at here")
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder


def opened(*paths: Path, images: Path | None = None) -> SampleIndex:
    options = SampleOptions(cache_dir=paths[0] / "cache")
    return open_index([DataEntry(path=path, images=images) for path in paths], None, 0, options, quiet=True)


def split(index: SampleIndex, amount: float) -> tuple[set[int], set[int]]:
    train_rows, held_out = split_held_out(index, np.arange(len(index)), amount)
    assert not set(train_rows.tolist()) & set(held_out.tolist())
    assert sorted([*train_rows.tolist(), *held_out.tolist()]) == list(range(len(index)))
    return set(train_rows.tolist()), set(held_out.tolist())


def images_of(index: SampleIndex, rows: set[int]) -> set[str]:
    return {Path(image.name).name for row in rows for image in index.row(row).images}


@pytest.mark.parametrize(("amount", "wanted"), [(0.1, 10), (0.25, 25), (1, 1), (30, 30), (99, 99)])
def test_a_share_or_a_number_of_records_is_held_out(amount: float, wanted: int, tmp_path: Path) -> None:
    index = opened(data_set(tmp_path / "set", [[f"{number}.jpg"] for number in range(100)]))
    train_rows, held_out = split(index, amount)
    assert len(held_out) == wanted
    assert split(index, amount) == (train_rows, held_out)
    assert wanted == 1 or sorted(held_out) != list(range(min(held_out), min(held_out) + wanted))  # from everywhere


@pytest.mark.parametrize("amount", [0.001, 100, 500])
def test_both_sides_keep_some_records(amount: float, tmp_path: Path) -> None:
    index = opened(data_set(tmp_path / "set", [[f"{number}.jpg"] for number in range(100)]))
    with pytest.raises(UserError, match=rf"validation_split {amount:g} holds out \d+ of 100 records"):
        split(index, amount)


@pytest.mark.parametrize("amount", [0.1, 0.3, 40])
def test_records_of_an_image_stay_together_and_the_amount_is_kept(amount: float, tmp_path: Path) -> None:
    """Three captions per image: a third of the records must not take all images along."""
    index = opened(data_set(tmp_path / "set", [[f"{number % 100}.jpg"] for number in range(300)]))
    train_rows, held_out = split(index, amount)
    assert not images_of(index, train_rows) & images_of(index, held_out)
    assert len(held_out) == pytest.approx(amount if amount >= 1 else amount * 300, abs=2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), amount=st.sampled_from([0.1, 0.5, 0.8, 3, 10]))
def test_no_image_is_on_both_sides_however_records_share_them(
    seed: int, amount: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Several images per record, chains of records, text-only ones."""
    chance = random.Random(seed)
    names = [f"{number}.jpg" for number in range(40)]
    images = [chance.sample(names, chance.choice([0, 1, 1, 1, 2, 3])) for _ in range(25)]
    index = opened(data_set(tmp_path_factory.mktemp("any") / "set", images))
    try:
        train_rows, held_out = split(index, amount)
    except UserError as error:
        assert "every image comes in more" in str(error)
        return
    assert train_rows and held_out
    assert not images_of(index, train_rows) & images_of(index, held_out)
    assert len(held_out) <= (amount if amount >= 1 else round(amount * 25))


def test_a_chain_of_shared_images_is_one_group(tmp_path: Path) -> None:
    chain = [[f"{number}.jpg", f"{number + 1}.jpg"] for number in range(60)]
    random.Random(0).shuffle(chain)
    index = opened(data_set(tmp_path / "set", [*chain, ["a.jpg"], ["b.jpg"], []]))
    _, held_out = split(index, 2)
    assert held_out <= {60, 61, 62} and len(held_out) == 2
    with pytest.raises(UserError, match=r"every image comes in more.*fewest.*are 65"):
        split(opened(data_set(tmp_path / "other", [*chain, *chain[:5]])), 0.5)


def test_an_image_that_two_data_sets_name_is_one_image(tmp_path: Path) -> None:
    """By other roots, with detours, through a link, and in a zip."""
    data_set(tmp_path / "all", [[f"{number}.jpg"] for number in range(20)])
    (tmp_path / "link").symlink_to(tmp_path / "all")
    for name, images, root in (
        ("below", [[f"images/{number}.jpg"] for number in range(20)], tmp_path / "all"),
        ("detours", [[f"./images//x/../{number}.jpg"] for number in range(20)], tmp_path / "link"),
    ):
        other = data_set(tmp_path / name, images, present=False)
        options = SampleOptions(cache_dir=tmp_path / "cache")
        data = [DataEntry(path=tmp_path / "all"), DataEntry(path=other, images=root)]
        index = open_index(data, None, 0, options, quiet=True)
        assert len(index) == 40
        train_rows, held_out = split(index, 0.25)
        assert len(held_out) == 10 and {row % 20 for row in held_out} & {row % 20 for row in train_rows} == set()


def test_an_image_of_a_zip_is_one_image_by_either_name(tmp_path: Path) -> None:
    names = [[f"{number}.jpg"] for number in range(10)] + [[f"images/{number}.jpg"] for number in range(10)]
    folder = data_set(tmp_path / "set", names, present=False)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(10):
            archive.writestr(f"images/{number}.jpg", b"not looked at here")
    index = opened(folder, images=tmp_path / "photos.zip")
    assert len(index) == 20
    train_rows, held_out = split(index, 4)
    assert {row % 10 for row in held_out} & {row % 10 for row in train_rows} == set()


def test_inline_images_and_data_sets_without_any_image(tmp_path: Path) -> None:
    uris = [f"data:image/png;base64,AAA{letter}" for letter in "ABCDE"]
    index = opened(
        data_set(tmp_path / "one", [[uri] for uri in uris], present=False),
        data_set(tmp_path / "two", [[uri] for uri in uris], present=False),
    )
    train_rows, held_out = split(index, 4)
    assert {row % 5 for row in held_out} & {row % 5 for row in train_rows} == set()
    texts = opened(data_set(tmp_path / "texts", [[]] * 10))
    assert len(split(texts, 0.3)[1]) == 3


# Quarantine.


@pytest.fixture
def two_sets(tmp_path: Path) -> SampleIndex:
    """Ten sound records each; the second set has faults at rows 3 and 7 besides."""
    first = data_set(tmp_path / "first", [[f"{number}.jpg"] for number in range(10)])
    second = data_set(tmp_path / "second", [[]] * 12)
    rows = json.loads((second / "chat.json").read_text())
    for number in (3, 7):
        rows[number]["conversations"][1]["value"] = ""
    (second / "chat.json").write_text(json.dumps(rows))
    return opened(first, second)


def quarantine_list(path: Path, index: SampleIndex, *places: tuple[int, Any], **changes: Any) -> Path:
    lines = []
    for part, row in places:
        source = index.data_sets[part]
        line = {"source": source.source.name, "contents": source.contents, "file": "chat.json", "row": row}
        lines.append(json.dumps({**line, **changes}))
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_quarantined_records_are_left_out_and_their_faults_forgiven(two_sets: SampleIndex, tmp_path: Path) -> None:
    rows, faults = drop_quarantined(two_sets, None)
    assert [mine.tolist() for mine in rows] == [list(range(10)), list(range(10, 20))]
    assert [[fault.row for fault in mine] for mine in faults] == [[], [3, 7]]
    listed = quarantine_list(tmp_path / "list.jsonl", two_sets, (0, 0), (0, 9), (1, 3), (1, 4), (1, 11))
    rows, faults = drop_quarantined(two_sets, listed)
    assert rows[0].tolist() == list(range(1, 9))
    assert [two_sets.row(row).number for row in rows[1].tolist()] == [0, 1, 2, 5, 6, 8, 9, 10]
    assert [[fault.row for fault in mine] for mine in faults] == [[], [7]]


def test_a_quarantine_list_holds_for_data_by_another_path(two_sets: SampleIndex, tmp_path: Path) -> None:
    """Also when data was moved; and what belongs to other data is of no matter."""
    listed = quarantine_list(tmp_path / "list.jsonl", two_sets, (0, 5), source="elsewhere")
    with listed.open("a") as file:
        file.write(json.dumps({"source": "eval", "contents": "abc", "file": "x.json", "row": 1}))
    rows, _ = drop_quarantined(two_sets, listed)
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_quarantine_list_for_other_contents_is_refused(two_sets: SampleIndex, tmp_path: Path) -> None:
    listed = quarantine_list(tmp_path / "list.jsonl", two_sets, (1, 5))
    second = two_sets.data_sets[1].source.entry.path
    (second / "chat.json").write_text((second / "chat.json").read_text().replace("Record 5", "Record five"))
    changed = opened(two_sets.data_sets[0].source.entry.path, second)
    with pytest.raises(UserError, match=rf"list\.jsonl: was written for other contents of {second}.*data check"):
        drop_quarantined(changed, listed)


def test_a_quarantine_list_for_a_renamed_file_is_refused(two_sets: SampleIndex, tmp_path: Path) -> None:
    listed = quarantine_list(tmp_path / "list.jsonl", two_sets, (1, 5), file="rows.json")
    with pytest.raises(UserError, match=r"list\.jsonl: names rows\.json, .* is called chat\.json"):
        drop_quarantined(two_sets, listed)


MALFORMED = [
    "{", "[]", "7", '"text"', "{}", '{"source": "a"}', '{"source": "a", "contents": "b", "file": "c", "row": "1"}',
    '{"source": "a", "contents": "b", "file": ["c"], "row": 1}',
    '{"source": 1, "contents": "b", "file": "c", "row": 1}',
    '{"source": "a", "contents": null, "file": "c", "row": true}', "[" * 100_000, "\xff",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_quarantine_list_is_refused(text: str, two_sets: SampleIndex, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.jsonl: not a quarantine list.*--quarantine FILE"):
        drop_quarantined(two_sets, tmp_path / "list.jsonl")


def test_a_quarantine_list_that_is_not_there_is_refused(two_sets: SampleIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: not a quarantine list"):
        drop_quarantined(two_sets, tmp_path / "gone.jsonl")
