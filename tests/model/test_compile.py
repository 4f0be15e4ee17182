"""Compiled layers compute what eager ones do, with one graph for all layers and all packs."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import varlen_reference
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import tiny_parts
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.errors import UserError
from llavaforge.join.parts import customize_model
from llavaforge.model import attention
from llavaforge.model.compile import compile_layers, compiles
from llavaforge.model.load import LoadedModel, load_model
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import cast_parameters, parameter_groups
from llavaforge.training.metrics import read_metrics
from llavaforge.training.run import train
from train_tools import open_packs, pack_of, train_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
not_on_old_torch = pytest.mark.skipif(torch.__version__ < "2.12", reason="layers are not compiled on a CPU there")
NUM_LAYERS = 9  # more than torch compiles one function anew


@not_on_old_torch
@pytest.mark.slow
def test_a_compiled_run_takes_the_steps_of_an_eager_one(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    losses = {}
    for option in (False, True):
        folder = tmp_path / str(option)
        train(train_config(tiny_llava, shapes / "train", folder, train_type="projector", compile=option, max_steps=3))
        losses[option] = [line["loss"] for line in read_metrics(folder)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert len(set(losses[True])) == 3


@not_on_old_torch
@pytest.mark.slow
def test_code_that_was_compiled_for_another_processor_is_not_taken(tiny_llava: Path, tmp_path: Path) -> None:
    """torch's own cache would give it, and vectors twice as long: every other number was not computed."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("a processor of one kind only")
    program = (
        "import sys, torch\n"
        "from llavaforge.model.compile import compile_layers\n"
        "from llavaforge.model.load import load_model\n"
        "model = load_model(sys.argv[1], torch.float32).model\n"
        "torch.manual_seed(0)\n"
        "pixels = torch.randn(2, 3, model.config.vision_config.image_size, model.config.vision_config.image_size)\n"
        "with torch.no_grad():\n"
        "    expected = model.get_image_features(pixels).pooler_output[0]\n"
        "    compile_layers(model)\n"
        "    found = model.get_image_features(pixels).pooler_output[0]\n"
        "assert torch.allclose(found, expected, atol=1e-5), float((found - expected).abs().max())\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for capability in ("avx512", "avx2"):
        command = [sys.executable, "-c", program, str(tiny_llava)]
        subprocess.run(command, env={**environment, "ATEN_CPU_CAPABILITY": capability}, check=True, timeout=300)
    assert len(list((tmp_path / "cache").glob("cpu-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "train_type", "num_breaks"), [("cuda", "use_lora", 0), ("cpu", "full", 1)])
def test_one_graph_serves_all_layers_and_all_packs(
    branch: str, train_type: str, num_breaks: int, tiny_clip: Path,
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Some, since what needs a gradient differs between the first layers and the others; fewer would do."""
    if branch == "cpu" and torch.__version__ < "2.12":
        pytest.skip("not compiled there")
    source = tiny_parts.save_language_model(tmp_path / "lm", "qwen2", num_hidden_layers=NUM_LAYERS)
    folder = tmp_path / "model"
    customize_model(CustomizeModelConfig(vision_tower=str(tiny_clip), language_model=str(source), output_dir=folder))
    if branch == "cuda":
        varlen_reference.register()
        monkeypatch.setattr(attention, "has_varlen", lambda *_: True)
    loaded = load_model(str(folder))
    config = train_config(folder, shapes / "train", tmp_path / "run", train_type=train_type)
    parameter_groups(loaded.model, config)
    _, dataset = open_packs(loaded, config)
    module = StepModule(loaded.model, loaded.preprocessing).train()
    cast_parameters(module, torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(loaded.model, backend=counter)
    counts = []
    for number in range(14):
        module(pack_of(dataset, *range(number, number + 2 + number % 5))).backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] <= 11
    assert len(counters["graph_break"]) == num_breaks


def test_a_layer_that_does_not_compile_runs_as_it_is_unless_it_was_asked_for(
    loaded_llava: LoadedModel, shapes: Path, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    losses = []
    for must in (None, False, True):
        loaded = load_model(str(loaded_llava.path))
        _, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", tmp_path))
        torch._dynamo.reset()
        if must is not None:
            compile_layers(loaded.model, must=must, backend=broken)
        module = StepModule(loaded.model, loaded.preprocessing)
        if must:
            with pytest.raises(Exception, match="no such instruction"):
                module(pack_of(dataset, 0, 1))
        else:
            losses.append(module(pack_of(dataset, 0, 1)).item())
    assert losses[0] == losses[1]


@not_on_old_torch
def test_long_runs_are_compiled_where_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [compiles("auto", CPU, flops) for flops in (1e12, 1e15)] == [False, True]
    assert not compiles("auto", torch.device("mps"), 1e30)
    assert compiles(True, CPU, 1.0) and not compiles(False, CPU, 1e30)
    for lack, words in (
        (dict(has_whole_weights=False), "ZeRO-3"),
        (dict(gradient_checkpointing=True), "gradient_checkpointing on a CPU"),
    ):
        assert not compiles("auto", CPU, 1e30, **lack)
        with pytest.raises(UserError, match=f"compile: true does not go with {words}"):
            compiles(True, CPU, 1.0, **lack)
    assert compiles("auto", CUDA, 1e30, gradient_checkpointing=True) == (importlib.util.find_spec("triton") is not None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not compiles("auto", CPU, 1e30)
    with pytest.raises(UserError, match=r"without a C\+\+ compiler"):
        compiles(True, CPU, 1.0)
