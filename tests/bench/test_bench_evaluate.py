"""The benchmark of `evaluate` runs, and both ways give the same answers."""

import json
from pathlib import Path

from bench.evaluate import main


def test_evaluate_and_a_loop_of_generate_give_the_same_answers(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--num_samples", "4", "--max_new_tokens", "3", "--num_pairs", "1"]
    assert main([*options, "--num_threads", "1", f"--output={tmp_path / 'out.json'}"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["same_answers"], found["answer_tokens"], found["num_pairs"]) == (4, 12, 1)
    assert found["times_as_fast"] == found["generate_s"][0] / found["evaluate_s"][0]
