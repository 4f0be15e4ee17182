"""The benchmark of data measures what it says, end to end and small."""

import json
import sys
from pathlib import Path

import pytest
from bench.data import run as data


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # its process of its own imports `bench`
    monkeypatch.setattr(data, "_NUM_DOCTOR_IMAGES", 96)
    monkeypatch.setattr(data, "_PAIRS", 1)
    monkeypatch.setattr(data, "_NUM_GENERATED", 8)
    output = tmp_path / "data.json"
    arguments = ["bench.data", "--records", "320", "--photos", str(tmp_path / "absent"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    data.main()
    results = json.loads(output.read_text())
    assert not results["photographs"] and results["images"]["images"] == 8
    assert results["images"]["images_with_unequal_pixels"] == 0 and results["images"]["ratio"]["median"] > 1
    (records,) = results["records"]
    assert (records["records"], records["faults"]) == (320, 0)
    assert records["open_s"] < records["prepare_s"] and 0 < records["random_access_us"] < 1000
    assert 0 < records["worker_uss_mb"]["largest"] < 50, "a loader worker has more than 50 MB of its own"
    assert results["zip_over_folder"]["median"] > 0 and results["doctor_over_bare_decoding"]["images"] == 96
    assert " 320 " in capsys.readouterr().out
