"""Where a run's time and memory go: shares that make up the whole, and a profile that changes nothing."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from llavaforge.clock import DATA, EVALUATION, OTHER, PARTS, TOWER, Clock
from llavaforge.engine.base import AdamWOptions
from llavaforge.engine.memory import Counts, engine_memory
from llavaforge.engine.plain import PlainEngine
from llavaforge.model.load import load_model
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import parameter_groups
from llavaforge.processes.world import World
from llavaforge.training.run import train
from train_tools import open_packs, pack_of, tensors_of, train_config
from zero_tools import held_out


def test_a_clock_gives_all_time_to_one_part_or_another() -> None:
    clock = Clock(torch.device("cpu"))
    begin = time.perf_counter()
    clock.begin(DATA)
    time.sleep(0.02)
    with clock.during(EVALUATION):
        clock.begin(TOWER)  # the held-out data's, which is no training
        time.sleep(0.02)
    time.sleep(0.02)
    clock.begin(OTHER)
    seconds, whole = clock.read(), time.perf_counter() - begin
    assert seconds[DATA] >= 0.04 and seconds[EVALUATION] >= 0.02 and seconds[TOWER] == 0
    assert seconds[DATA] + seconds[EVALUATION] <= whole <= sum(seconds.values()) + 0.5
    assert sum(clock.read().values()) < 0.5, "time is given once"


@pytest.mark.parametrize("train_type", ["projector", "full"])
def test_a_line_of_metrics_says_where_its_time_went(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = dict(max_steps=4, logging_steps=2, save_steps=1, train_type=train_type, **held_out(shapes))
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", gradient_checkpointing=True, **values))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        shares = {part: line[f"time_share_{part}"] for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1, abs=0.001)
        assert min(shares[part] for part in ("vision_tower", "language_model", "optimizer", "saving")) > 0
        assert 0 < line["mfu_vision_tower"] < 1 and 0 < line["mfu_language_model"] < 1
        assert line["hfu"] > 0
    assert any(message.startswith("time: ") for message in caplog.messages)


def test_a_profile_is_left_and_changes_nothing(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    runs = []
    for profiled in (False, True):
        folder = tmp_path / str(profiled)
        train(train_config(tiny_llava, shapes / "train", folder, max_steps=6, profile=profiled))
        runs.append(tensors_of(folder / "final"))
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    assert not (tmp_path / "False" / "profile").exists()
    folder = tmp_path / "True" / "profile"
    with gzip.open(folder / "trace-rank0.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 3
    assert {"part: data", "part: vision_tower", "part: language_model", "part: optimizer"} <= set(names)
    table = (folder / "table-rank0.txt").read_text()
    assert "aten::" in table and "language model" in table and "peak memory" in table
    assert sorted(path.name for path in folder.iterdir()) == ["table-rank0.txt", "trace-rank0.json.gz"]


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_run_of_few_steps_is_profiled_too(num_steps: int, tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    train(train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=num_steps, profile=True))
    assert (tmp_path / "run" / "profile" / "trace-rank0.json.gz").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_engine_keeps_is_what_is_told(
    dtype: torch.dtype, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    """All tensors of the plain engine after a step, by part."""
    loaded = load_model(str(tiny_llava))
    config = train_config(tiny_llava, shapes / "train", tmp_path, train_type="freeze_vision")
    _, dataset = open_packs(loaded, config)
    groups = parameter_groups(loaded.model, config)
    told = engine_memory("plain", Counts.of(loaded.model), 1, dtype.itemsize)
    module, engine = StepModule(loaded.model, loaded.preprocessing), PlainEngine(World())
    engine.prepare(module, groups, AdamWOptions.of(config), dtype)
    engine.micro_step(pack_of(dataset, 0), 1.0)
    masters = dict(engine.local_masters())
    gradients = sum(master.numel() * 4 for master in masters.values())
    engine.step(1.0)
    moments = 2 * gradients
    assert told.weights == sum(parameter.nbytes for parameter in module.parameters())
    assert told.gradients == gradients
    assert told.optimizer == moments + (gradients if dtype == torch.bfloat16 else 0)
