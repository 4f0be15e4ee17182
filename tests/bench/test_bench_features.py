"""The benchmark of kept features runs, and reads and computes less with them."""

import json
from pathlib import Path

import pytest
from bench.features import main


def test_kept_features_save_reading_and_the_towers_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVAFORGE_CACHE", str(tmp_path / "cache"))
    assert main(["--size", "tiny", "--num_pairs", "3", "--num_threads", "1", f"--output={tmp_path / 'out.json'}"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["sizes"]["tiny"]
    assert found["read_kept_s"] < found["read_s"]
    assert found["by_flops"] > 1 and found["num_pairs"] == 3
