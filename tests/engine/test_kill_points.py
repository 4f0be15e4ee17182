"""Whenever a run is ended, and with however many processes it goes on, it ends as the undisturbed one does."""

import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavaforge.training.run import train
from rank_worker import injected
from ranks import RankPool
from train_tools import TRAIN_TYPES, tensors_of, train_config

STEPS = 6
undisturbed: dict[str, dict[str, torch.Tensor]] = {}


def weights_of(run: Path, train_type: str) -> dict[str, torch.Tensor]:
    if train_type != "use_lora":
        return tensors_of(run / "final")
    from llavaforge.model_folder.tensors import open_tensors

    adapter = open_tensors(run / "final", "adapter_model")
    return {name: adapter[name] for name in adapter}


# The kills are exceptions within the processes, which a new start in the same process meets as it would a dead one's
# folder: a start costs a tenth of a second in place of ten. Kills of whole processes are in test_kills.py,
# test_resume.py, test_lost_rank.py and `make soak`.
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train_type=st.sampled_from(TRAIN_TYPES),
    kills=st.lists(st.tuples(st.integers(1, STEPS - 1), st.sampled_from([1, 1, 2])), max_size=3),
    last_size=st.sampled_from([1, 1, 2]),
    save_steps=st.integers(1, 4),
    num_workers=st.sampled_from([0, 0, 1]),
)
def test_whenever_it_is_killed_a_run_ends_with_the_undisturbed_weights(
    train_type: str, kills: list[tuple[int, int]], last_size: int, save_steps: int, num_workers: int,
    two_ranks: RankPool, tiny_llava: Path, shapes: Path, tmp_path: Path,
) -> None:  # fmt: skip
    def config(output_dir: Path, **more: Any) -> Any:
        values: dict[str, Any] = dict(
            train_type=train_type, max_steps=STEPS, global_batch_size=4, per_device_train_batch_size=2,
            learning_rate=1e-3, dataloader_num_workers=num_workers,
        )  # fmt: skip
        return train_config(tiny_llava, shapes / "train", output_dir, **(values | more))

    if train_type not in undisturbed:
        train(config(tmp_path / f"undisturbed-{train_type}"))
        undisturbed[train_type] = weights_of(tmp_path / f"undisturbed-{train_type}", train_type)
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    disturbed = config(run, save_steps=save_steps)
    for step, size in kills:
        if size == 2:
            two_ranks.run(disturbed, die=step)
            continue
        try:
            with injected({"die": step}):
                train(disturbed)
        except RuntimeError as error:
            assert str(error) == "killed"
    (train if last_size == 1 else two_ranks.train)(disturbed)
    sizes = {last_size, *(size for _, size in kills)}
    found, expected = weights_of(run, train_type), undisturbed[train_type]
    tolerance = 0.0 if sizes == {1} else 1e-5
    assert [n for n, t in expected.items() if float((found[n] - t).abs().max()) > tolerance] == []
