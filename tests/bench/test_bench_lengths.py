"""The benchmark of packs of different lengths runs, and its figures fit together."""

import json
from pathlib import Path

import pytest
from bench.lengths import main


def test_longer_packs_take_longer(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert main(["--size", "tiny", "--samples", "1", "4", "16", "--num_steps", "2", f"--output={output}"]) == 0
    found = json.loads(output.read_text())
    assert found["tokens"] == sorted(found["tokens"]) and found["seconds"][0] < found["seconds"][-1]
    per_thousand = [1000 * s / t for s, t in zip(found["seconds"], found["tokens"], strict=True)]
    assert found["seconds_per_1000_tokens"] == pytest.approx(per_thousand, rel=0.01)
    assert len(found["from_the_line"]) == 3
