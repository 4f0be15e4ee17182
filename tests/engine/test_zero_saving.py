"""Several processes write a checkpoint while they train: the same bytes, and one fault ends all."""

from pathlib import Path

import pytest

from llavaforge.folders import differences
from llavaforge.training.metrics import read_metrics
from ranks import RankPool
from train_tools import train_config
from zero_tools import options

# For both ranks' shares, on one host: 65,344 parameters learn, 12 bytes each, and a quarter stays free.
ENOUGH_MEMORY = 65_344 * 12 * 5 // 4


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_what_ranks_write_while_steps_go_on_equals_what_they_write_at_once(
    stage: str, two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    values = options(deepspeed=stage, save_steps=3, max_steps=6)
    runs = [tmp_path / "background", tmp_path / "at_once"]
    configs = [train_config(tiny_llava, shapes / "train", run, **values) for run in runs]
    two_ranks.train(configs[0], memory=ENOUGH_MEMORY, write_after=[1, 5])
    two_ranks.train(configs[1], memory=ENOUGH_MEMORY - 1)
    for step in (3, 6):
        folders = [run / f"checkpoint-{step}" for run in runs]
        assert [differences(folder) for folder in folders] == [[], []]
        one, other = ({p.name: p.read_bytes() for p in folder.glob("state*")} for folder in folders)
        assert one == other and len(one) == 3  # a shard of each rank, and the index
    written = [[line["step"] for line in read_metrics(run) if "save_write_time_s" in line] for run in runs]
    assert written == [[6], [3, 6]]


def test_a_fault_of_one_rank_s_writing_ends_all_and_leaves_the_checkpoint_before(
    two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(tiny_llava, shapes / "train", tmp_path / "run", **options(deepspeed="zero2", save_steps=3))
    answers = two_ranks.run(config, stop=[1, 2])
    assert [answer["code"] for answer in answers] == [75, 75], answers
    answers = two_ranks.run(config, write_fails=1)
    assert [answer["code"] for answer in answers] == [2, 2], answers
    (told,) = (answer["message"] for answer in answers if answer["error"] == "UserError")
    assert "checkpoint-3 is not saved: " in told and "checkpoint-2 is intact" in told
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
