"""The benchmark on a tiny model: it runs from end to end, and refuses to compare sides that do different work."""

import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import pytest
from bench.fairness import Unfair, check_counts, check_first_loss, check_losses
from bench.machine import source_sha256
from bench.parts import make_model, make_tokenizer
from bench.race.race import race
from bench.race.run import main
from bench.race.shares import forward_shares
from bench.race.work import make_tasks
from bench.samples import NUM_SAMPLES, make_samples
from bench.scenarios import REAL, SCENARIOS, SIZES, Scenario

NUM_STEPS = 2
LORA = next(scenario for scenario in SCENARIOS if scenario.train_type == "use_lora")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the samples, and their texts. Read only."""
    folder = tmp_path_factory.mktemp("samples") / "data"
    return folder, make_samples(folder)


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # the contenders are started as modules of this repository
    output = tmp_path / "results" / "run.json"
    options = ["--size", "tiny", "--num_steps", str(NUM_STEPS), "--batch_size", "2", "--bf16", "false"]
    options += ["--compile", "false"]
    assert main([*options, "--scenario", LORA.name, "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    (scenario,) = results["scenarios"]
    for side in LORA.sides:
        figures = scenario["sides"][side]
        assert len(figures["step_time_s"]) == NUM_STEPS
        samples_per_s = 2 * NUM_STEPS / sum(figures["step_time_s"])
        assert figures["samples_per_s"] == pytest.approx(samples_per_s)
        assert 0 < figures["supervised_tokens_per_s"] < figures["tokens_per_s"]
        assert 0 < figures["mfu"] < 1
        assert figures["peak_memory_bytes"] > 100 * 2**20  # torch alone takes more
    ours, usual = (scenario["sides"][side] for side in ("ours", "usual"))
    assert ours["losses"][0] == pytest.approx(usual["losses"][0], rel=1e-4)
    assert ours["padding_share"] == 0 < usual["padding_share"]
    assert ours["worker_memory_bytes"] > 0 == usual["worker_memory_bytes"]
    assert scenario["bar_met"] == (scenario["speedup"]["usual"]["median"] >= scenario["bar"])
    assert results["help"]["bar_met"] == (results["help"]["seconds"] < results["help"]["bar_s"])
    assert results["source_sha256"] == source_sha256()
    assert platform.node() not in output.read_text()


def test_other_samples_are_refused(
    samples: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "data").symlink_to(samples[0])
    model = make_model(tmp_path / "model", SIZES["tiny"], samples[1])
    scenario = Scenario("captions", "projector", 1e-3, 1.5, ("ours", "usual"))
    tasks = make_tasks(scenario, model, tmp_path, batch_size=2, num_measured=1, bf16=False, compiled=False)
    tasks["usual"] = replace(tasks["usual"], order=tasks["usual"].order[::-1])
    with pytest.raises(Unfair, match="step 1"):
        race(scenario, tasks, 1, tmp_path / "logs")


def test_losses_that_differ_are_refused() -> None:
    check_first_loss({"ours": 8.7, "usual": 8.7003})
    for other in (8.71, math.nan):
        with pytest.raises(Unfair, match="step 1"):
            check_first_loss({"ours": 8.7, "usual": other})
    check_losses({"ours": [8.7, 8.6], "usual": [8.7, 8.61]})
    with pytest.raises(Unfair, match="step 2"):
        check_losses({"ours": [8.7, 8.6], "usual": [8.7, 8.3]})


@pytest.mark.parametrize(
    ("supervised", "tokens", "num_learning", "fault"),
    [([5, 6], [30, 40], 99, "parameters"), ([5, 7], [30, 40], 100, "supervised"), ([5, 6], [30, 37], 100, "tokens")],
)
def test_counts_that_differ_are_refused(
    supervised: list[int], tokens: list[int], num_learning: int, fault: str
) -> None:
    ours = {"supervised": [5, 6], "tokens": [32, 40]}
    usual = {"supervised": supervised, "tokens": tokens}
    same = {"ours": 100, "usual": 100}
    check_counts({"ours": ours, "usual": {**ours, "tokens": [30, 40]}}, same, [5, 6], [32, 40], batch_size=2)
    with pytest.raises(Unfair, match=fault):
        check_counts({"ours": ours, "usual": usual}, {**same, "usual": num_learning}, [5, 6], [32, 40], batch_size=2)


def test_lengths_of_the_samples(samples: tuple[Path, list[str]]) -> None:
    folder, texts = samples
    tokenizer = make_tokenizer(SIZES["replica"].vocab_size - 1, texts)

    def num_tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    captions = json.loads((folder / "captions.json").read_text())
    answers = [num_tokens(row["conversations"][1]["value"]) + 1 for row in captions]
    assert 12 <= min(answers) <= max(answers) <= 20
    lengths = []
    for row in json.loads((folder / "instructions.json").read_text()):
        roles = ("user", "assistant") * (len(row["conversations"]) // 2)
        messages = [
            {"role": role, "content": turn["value"].replace("<image>", "")}
            for role, turn in zip(roles, row["conversations"], strict=True)
        ]
        lengths.append(num_tokens(tokenizer.apply_chat_template(messages, tokenize=False)))
    assert len(lengths) == NUM_SAMPLES
    assert 40 <= min(lengths) < 80 and 240 < max(lengths) <= 330


def test_samples_are_a_function_of_the_seed(samples: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, texts = samples
    assert make_samples(tmp_path) == texts
    one, other = ((path / "images" / "bench_00007.jpg").read_bytes() for path in (folder, tmp_path))
    assert one == other


def test_photographs_from_a_folder(samples: tuple[Path, list[str]], tmp_path: Path) -> None:
    make_samples(tmp_path / "data", photos=samples[0])
    rows = json.loads((tmp_path / "data" / "captions.json").read_text())
    assert all((tmp_path / "data" / "images" / row["image"]).is_file() for row in rows)


def test_replica_has_the_real_pairs_shares() -> None:
    replica, real = (forward_shares(SIZES[name], 50, 16) for name in ("replica", REAL))
    assert sum(real.values()) == pytest.approx(1)
    for part, share in real.items():
        # Attention over 626 tokens weighs more in a narrow model; that is the largest difference.
        assert abs(replica[part] - share) < 0.1, part
