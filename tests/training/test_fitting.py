"""`auto` chooses what fits, the fastest first, and touches nothing else."""

from pathlib import Path

import pytest
import torch

from llavaforge.device import total_memory
from llavaforge.machine.random_model import PUBLISHED, llava_config, preprocessing, train_options
from llavaforge.model.memory import activations
from llavaforge.processes.world import World
from llavaforge.training import fitting
from llavaforge.training.fitting import fitted
from llavaforge.training.metrics import read_metrics
from llavaforge.training.pack_memory import Sizes, decide
from llavaforge.training.run import train
from llavaforge.training.trainer import Trainer
from train_tools import tensors_of, train_config

CAPTIONS = Sizes(longest=660, mean=620, images_per_token=1 / 620, supervised_per_token=0.03)
KEPT = activations(llava_config(PUBLISHED), train_options("projector"), preprocessing(PUBLISHED), torch.bfloat16)


@pytest.mark.parametrize(("budget", "every"), [(71e9, 0), (30e9, 0), (15e9, 4), (13e9, 2), (9e9, 1), (1e9, 1)])
def test_as_few_layers_are_recomputed_as_memory_allows(budget: float, every: int) -> None:
    """Eight captions a micro-batch, what a card has left beside the weights."""
    config = train_options("projector", per_device_train_batch_size=8)
    tokens, chosen = decide(config, KEPT, budget, CAPTIONS)
    assert (tokens, chosen) == (None, every)
    if budget > 1e9:
        assert CAPTIONS.bytes(KEPT, CAPTIONS.largest_pack(8), chosen) <= budget


@pytest.mark.parametrize("budget", [200e9, 60e9, 30e9, 12e9, 4e9])
def test_a_micro_batch_holds_as_many_tokens_as_fit(budget: float) -> None:
    config = train_options("projector", max_tokens_per_batch="auto", global_batch_size=256)
    tokens, every = decide(config, KEPT, budget, CAPTIONS)
    assert tokens is not None and CAPTIONS.longest <= tokens <= 16_384
    assert CAPTIONS.bytes(KEPT, tokens, every) <= budget
    more, _ = decide(config, KEPT, 2 * budget, CAPTIONS)
    assert more is not None and (more >= tokens or every)


def test_the_longest_sample_has_its_place_whatever_the_memory() -> None:
    config = train_options("projector", max_tokens_per_batch="auto", global_batch_size=256)
    assert decide(config, KEPT, 0.0, CAPTIONS) == (CAPTIONS.longest, 1)


def test_what_is_given_stays() -> None:
    options = dict(gradient_checkpointing=3, max_tokens_per_batch=700, global_batch_size=256)
    config = train_options("projector", **options)
    assert decide(config, KEPT, 0.0, CAPTIONS) == (700, 3)


def test_on_a_cpu_auto_gives_the_weights_of_a_bound_by_hand(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    options = dict(max_steps=2, train_type="full", per_device_train_batch_size=None, bf16=False)
    for bound in ("auto", 8192):
        train(train_config(tiny_llava, shapes / "train", tmp_path / str(bound), max_tokens_per_batch=bound, **options))
    ours, theirs = (tensors_of(tmp_path / bound / "final") for bound in ("auto", "8192"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_card_that_is_too_small_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on whose memory alone the choice depends."""
    world = World(device=torch.device("meta"))
    monkeypatch.setattr(fitting, "_kept_and_budget", lambda *_: (KEPT, 1e9))
    with caplog.at_level("INFO", "llavaforge"):
        config = fitted(train_options("projector"), None, CAPTIONS, world)  # type: ignore[arg-type]
    assert (config.recompute_every, config.most_tokens) == (1, None)
    assert "It may not fit" in caplog.text and "every layer is recomputed" in caplog.text


def test_a_rehearsal_changes_no_weight(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(train_type="full", max_steps=3, learning_rate=1e-3, bf16=False)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "without", **config))
    init, rehearsed = Trainer.__init__, []

    def as_on_a_gpu(self: Trainer, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self._rehearses = True
        micro_step = self._engine.micro_step

        def counted(pack: object, scale: float) -> torch.Tensor:
            rehearsed.extend([pack] * (scale == 0.0))
            return micro_step(pack, scale)  # type: ignore[arg-type]

        self._engine.micro_step = counted  # type: ignore[method-assign, assignment]

    monkeypatch.setattr(Trainer, "__init__", as_on_a_gpu)
    train(train_config(tiny_llava, shapes / "train", tmp_path / "with", **config))
    assert len(rehearsed) == 1
    largest = max(line["num_tokens"] for line in read_metrics(tmp_path / "with"))
    assert 0 < rehearsed[0].num_tokens <= largest  # type: ignore[attr-defined]
    ours, theirs = (tensors_of(tmp_path / name / "final") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_memory_is_that_of_the_host_on_a_cpu() -> None:
    assert 2**28 < total_memory(torch.device("cpu")) < 2**50
