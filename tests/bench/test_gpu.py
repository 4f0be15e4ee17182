"""The benchmark for GPUs at tiny sizes on a CPU: every kind of row gives its figures."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from bench.gpu.row import run
from bench.gpu.rows import ROWS, Row
from bench.gpu.run import line, main


@pytest.mark.parametrize("row", [Row("use_lora", 4), Row("projector", 4, 2, data="instructions", recompute_every=2)])
def test_our_side(row: Row) -> None:
    result = run(replace(row, size="tiny"))
    assert result["samples_per_s"] > 0 and 0 < result["mfu"] < 1
    assert f"{result['samples_per_s']:.2f} samples/s" in line(row, result)


def test_the_usual_way_takes_its_best_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(Row("use_lora", side="usual", size="tiny"))
    assert result["samples_per_s"] == max(one["samples_per_s"] for one in result["tried"])
    assert [one["num_samples"] for one in result["tried"]] == [8, 16, 32]


def test_rows_travel_as_json_and_cover_every_train_type() -> None:
    assert all(Row(**json.loads(json.dumps(asdict(row)))) == row for row in ROWS)
    assert {row.train_type for row in ROWS} == {"projector", "use_lora", "freeze_vision", "full"}
    assert {row.side for row in ROWS} == {"ours", "usual"}


@pytest.mark.slow
def test_a_row_in_its_own_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--size", "tiny", "--only", "1", "--output", str(tmp_path / "gpu.json")])
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["samples_per_s"] > 0 and "projector" in capsys.readouterr().out
