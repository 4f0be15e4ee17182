"""Kept vision features give the bytes of a run without them, whatever happens to their files."""

import base64
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from llavaforge.cli import main
from llavaforge.config.schema import TrainConfig
from llavaforge.data.load.features import FeatureFile
from llavaforge.data.order.plan import MicroBatch
from llavaforge.errors import RunFailed, UserError
from llavaforge.model.features import FeatureMaker
from llavaforge.model.load import load_model
from llavaforge.model.step import StepModule
from llavaforge.model.tower import normalize, tower_features
from llavaforge.processes.world import World
from llavaforge.training import features
from llavaforge.training.bad_samples import BAD_SAMPLES
from llavaforge.training.features import keeping_features
from llavaforge.training.opening import OpenedStage, open_stage
from llavaforge.training.run import train
from train_tools import arguments_of, tensors_of, train_config
from warm import WarmProcess, command_line

NUM_IMAGES = 40  # of `data`
OF_EIGHT: dict[str, Any] = {"global_batch_size": 8, "per_device_train_batch_size": 8}
"""Steps whose tower sees as many images at once as it does when features are computed: then bytes are equal."""


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A private copy of the training data."""
    return Path(shutil.copytree(shapes / "train", tmp_path / "data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVAFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def num_computed(caplog: pytest.LogCaptureFixture) -> Callable[[], list[int]]:
    """A function that returns how many images each run since the last call ran the tower over."""

    def found() -> list[int]:
        numbers = [int(number) for number in re.findall(r"computed those of (\d+) images", caplog.text)]
        caplog.clear()
        return numbers

    return found


@pytest.fixture
def run(tiny_llava: Path, data: Path, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """A function that trains ten steps, two epochs, and returns the weights."""

    def trained(name: str, kind: str = "off", model: Path = tiny_llava, **values: Any) -> dict[str, bytes]:
        values = {"train_type": "projector", "max_steps": 10} | OF_EIGHT | values
        train(train_config(model, data, tmp_path / name, cache_vision_features=kind, **values))
        return weights(tmp_path / name)

    return trained


def weights(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((folder / "final").glob("*.safetensors"))}
    assert found
    return found


def kept_stage(
    model: Path, data: Path, output_dir: Path, kind: str = "disk", world: World | None = None, **values: Any
) -> AbstractContextManager[OpenedStage]:
    config = train_config(model, data, output_dir, train_type="projector", max_steps=10, **values)
    config = config.model_copy(update={"cache_vision_features": kind})
    opened = open_stage(config, World(), Console(quiet=True))
    return keeping_features(opened, world or World())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_what_the_tower_makes_of_an_image_depends_on_nothing_else(
    dtype: torch.dtype, rounding: float, tiny_llava: Path
) -> None:
    """To the bit at one size of batch, whatever else is in it; a batch of another size may round otherwise."""
    loaded = load_model(str(tiny_llava))
    pixels = torch.randint(0, 256, (11, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    make = FeatureMaker(loaded, torch.device("cpu"), dtype)
    made = make(pixels)
    assert made.dtype == dtype and len(made.unique(dim=0)) == 11
    assert torch.equal(make(pixels.flip(0)).flip(0), made)
    assert torch.equal(torch.cat([make(part) for part in pixels.split(3)]), made)
    with torch.no_grad():
        in_steps = [tower_features(loaded.model, normalize(pixels[:8], loaded.preprocessing, dtype))]
        in_steps += [tower_features(loaded.model, normalize(pixels[8:], loaded.preprocessing, dtype))]
    assert torch.equal(in_steps[0], made[:8])
    torch.testing.assert_close(in_steps[1], made[8:], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("train_type", ["projector", "freeze_vision", "use_lora"])
def test_a_run_with_kept_features_ends_with_the_bytes_of_one_without(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path, num_computed: Callable[[], list[int]]
) -> None:
    def run(name: str, **changes: Any) -> Any:
        values: dict[str, Any] = {"train_type": train_type, "max_steps": 8, "validation_split": 8, "eval_steps": 4}
        values |= OF_EIGHT
        return train(train_config(tiny_llava, shapes / "train", tmp_path / name, **values, **changes))

    without = run("without")
    ways = [("computed", "disk", 2), ("read", "disk", 0), ("memory", "memory", 1)]
    ways = ways if train_type == "projector" else ways[:1]
    for name, kind, workers in ways:
        kept = run(name, cache_vision_features=kind, dataloader_num_workers=workers)
        assert weights(tmp_path / name) == weights(tmp_path / "without")
        assert kept["eval_loss"] == without["eval_loss"]
    assert num_computed() == [NUM_IMAGES, 0, NUM_IMAGES][: len(ways)]
    assert not [path for path in Path("/proc/self/fd").iterdir() if ".features" in str(path.resolve())]  # memory too


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_no_step_decodes_an_image_or_runs_the_tower(kind: str, tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    order = [MicroBatch(0, tuple(range(at, at + 8)), True, 0, 999) for at in range(0, NUM_IMAGES, 8)]
    losses = []
    for chosen in ("off", kind):
        with kept_stage(tiny_llava, data, tmp_path / "run", chosen) as opened:
            model = opened.loaded.model
            module = StepModule(model, opened.loaded.preprocessing, features_given=bool(opened.features))
            if chosen != "off":
                shutil.rmtree(data / "images")
                for parameter in model.model.vision_tower.parameters():
                    parameter.data.fill_(torch.nan)
            with opened.packs(opened.data.index, order, pin_memory=False) as packs:
                losses.append([module(pack).item() for pack in packs])
    assert losses[0] == losses[1] and len(set(losses[0])) == 5


def test_a_run_that_was_killed_while_it_computed_goes_on_with_what_is_whole(
    run: Callable[..., dict[str, bytes]], tiny_llava: Path, data: Path, tmp_path: Path, num_computed: Any
) -> None:
    config = train_config(
        tiny_llava, data, tmp_path / "killed", train_type="projector", max_steps=10, cache_vision_features="disk",
        **OF_EIGHT,
    )  # fmt: skip
    half = """
import os, signal
pwrite, done = os.pwrite, []
def killed_half_way(file, content, at):
    if len(done) == 14:
        pwrite(file, content[: len(content) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(at)
    return pwrite(file, content, at)
os.pwrite = killed_half_way
"""
    assert WarmProcess(command_line, arguments_of(config), half).wait(300) == -9
    assert run("killed", "disk") == run("without")
    assert num_computed() == [NUM_IMAGES - 14]


def flip(path: Path) -> int:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return 1


def cut(path: Path) -> int:
    os.truncate(path, path.stat().st_size // 2 + 1)  # within the first slot of the second half
    return NUM_IMAGES // 2


def lose(path: Path) -> int:
    path.unlink()
    return NUM_IMAGES


@pytest.mark.parametrize("spoil", [flip, cut, lose])
def test_what_is_damaged_is_computed_anew(
    spoil: Callable[[Path], int], cache: Path, run: Callable[..., dict[str, bytes]], num_computed: Any
) -> None:
    whole = run("whole", "disk")
    (path,) = cache.glob("*.features")
    num_lost = spoil(path)
    assert run("again", "disk") == whole
    assert num_computed() == [NUM_IMAGES, num_lost]


def test_damage_while_in_use_ends_the_run_and_is_never_trained_on(
    tiny_llava: Path, data: Path, tmp_path: Path, cache: Path
) -> None:
    with kept_stage(tiny_llava, data, tmp_path / "run") as opened:
        (path,) = cache.glob("*.features")
        flip(path)
        order = [MicroBatch(0, (number,), True, 0) for number in range(NUM_IMAGES)]
        with opened.packs(opened.data.index, order, pin_memory=False) as packs:
            with pytest.raises(RunFailed, match=r"chat.json row 20 .*damaged while in use"):
                list(packs)


def test_what_changed_is_never_served_stale(
    run: Callable[..., dict[str, bytes]], tiny_llava: Path, data: Path, tmp_path: Path, num_computed: Any
) -> None:
    first = run("first", "disk")
    rows = json.loads((data / "chat.json").read_text())
    one, other = (data / "images" / rows[number]["image"] for number in (0, 1))
    size = max(one.stat().st_size, other.stat().st_size)
    for path in (one, other):  # a PNG may have anything behind its end
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert run("padded", "disk") == first
    before = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert one.stat().st_size == before.st_size
    changed = run("changed", "disk")
    assert changed == run("changed-without") != first
    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))
    (weights_file,) = model.glob("*.safetensors")
    tensors = load_file(weights_file)
    name = next(name for name in tensors if "vision" in name and name.endswith("layers.0.mlp.fc1.bias"))
    tensors[name] += 0.5
    save_file(tensors, weights_file, metadata={"format": "pt"})
    assert run("tower", "disk", model=model) == run("tower-without", model=model) != changed
    assert num_computed() == [NUM_IMAGES] * 4


def test_bad_images_are_left_out_as_without(
    run: Callable[..., dict[str, bytes]], data: Path, tmp_path: Path, num_computed: Any
) -> None:
    rows = json.loads((data / "chat.json").read_text())
    # Two images in a row, one of them bad; the sound one comes in another row too.
    rows[0] = {**rows[0], "image": [rows[1]["image"], rows[17]["image"]]}
    rows[0]["conversations"][0]["value"] = "<image><image>\nWhat is it?"
    (data / "chat.json").write_text(json.dumps(rows))
    (data / "images" / rows[17]["image"]).write_bytes(b"<html>not found</html>")
    values: dict[str, Any] = {"on_bad_sample": "skip", "train_type": "freeze_vision"}
    run("kept", "disk", **values)
    run("without", **values)
    one, two = (tensors_of(tmp_path / name / "final") for name in ("kept", "without"))
    for name in two:  # the step with two images in a row has nine of them
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    listed = [(tmp_path / name / BAD_SAMPLES).read_text() for name in ("kept", "without")]
    assert listed[0] == listed[1] and {json.loads(line)["row"] for line in listed[0].splitlines()} == {0, 17}
    assert num_computed() == [NUM_IMAGES - 2]  # the bad one, and that of row 0, which no row has now
    told = []
    for name, kind in (("stop", "disk"), ("stop-without", "off")):
        with pytest.raises(UserError, match="cannot be decoded") as caught:
            run(name, kind)
        told.append(str(caught.value).replace(str(tmp_path / name), ""))
    assert told[0] == told[1]


def test_the_option_may_change_between_the_starts_of_a_run(
    run: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    whole = run("whole", save_steps=5)
    run("parts", "disk", save_steps=5)
    for name in ("final", "checkpoint-10"):
        shutil.rmtree(tmp_path / "parts" / name)
    (tmp_path / "parts" / "latest").unlink()
    assert run("parts", save_steps=5) == whole
    for name in ("final", "checkpoint-10"):
        shutil.rmtree(tmp_path / "parts" / name)
    (tmp_path / "parts" / "latest").unlink()
    assert run("parts", "memory", save_steps=5) == whole


def test_stages_share_what_is_kept(
    run: Callable[..., dict[str, bytes]], tiny_llava: Path, data: Path, tmp_path: Path, num_computed: Any
) -> None:
    stages = [{"name": "one", "train_type": "projector"}, {"name": "two", "train_type": "freeze_vision"}]
    stages += [{"name": "three", "train_type": "full", "cache_vision_features": "off"}]
    config = train_config(
        tiny_llava, data, tmp_path / "run", max_steps=10, stages=stages, cache_vision_features="disk", **OF_EIGHT
    )
    train(config)
    assert num_computed() == [NUM_IMAGES, 0]


def test_only_the_images_of_the_steps_ahead_are_computed(run: Callable[..., Any], num_computed: Any) -> None:
    run("short", "disk", max_steps=3)
    run("longer", "disk", max_steps=5)
    assert num_computed() == [24, 16]


def test_processes_share_the_work_and_every_host_gets_all(
    tiny_llava: Path, data: Path, tmp_path: Path, num_computed: Any
) -> None:
    def process(rank_on_host: int, size_on_host: int) -> None:
        world = World(0, 2)
        world.rank_on_host, world.size_on_host = rank_on_host, size_on_host
        with kept_stage(tiny_llava, data, tmp_path / "run", world=world):
            pass

    process(0, 2)  # both on one host: the other computes its half
    process(0, 1)  # the other one's host has a disk of its own: what is not there is computed here too
    process(0, 1)
    assert num_computed() == [NUM_IMAGES // 2, NUM_IMAGES // 2, 0]


def test_too_little_room_is_told_with_the_sum(
    run: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache.parent.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000))
        with pytest.raises(UserError, match=r"40 images x 4 tokens x \d+ numbers of 4 bytes = .* 0.0 MB free"):
            run("disk", "disk")
    with monkeypatch.context() as patch:
        patch.setattr(features, "free_host_memory", lambda: 2_000)
        with pytest.raises(UserError, match=r"does not fit.*host's memory"):
            run("memory", "memory")
    run("disk", "disk")


def test_data_sets_of_every_kind_of_image_and_of_none(
    tiny_llava: Path, data: Path, tmp_path: Path, num_computed: Any
) -> None:
    """Files of a zip, images within rows (the first one twice), texts alone, and held-out data of another folder."""
    rows = json.loads((data / "chat.json").read_text())
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for row in rows[:16]:
            archive.write(data / "images" / row["image"], row["image"])
    inline = [row | {"image": _inline(data / "images" / row["image"])} for row in (rows[16], *rows[16:24])]
    texts = [{"id": "t", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}]
    for name, some in (("zipped", rows[:16]), ("inline", inline), ("texts", texts), ("held-out", rows[24:32])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    entries = [{"path": tmp_path / f"{name}.json"} for name in ("zipped", "inline", "texts")]
    entries[0]["images"] = tmp_path / "images.zip"
    held_out = {"path": tmp_path / "held-out.json", "images": data / "images"}
    eval_loss = []
    for kind in ("off", "disk"):
        values = train_config(tiny_llava, data, tmp_path / kind, max_steps=7, cache_vision_features=kind, **OF_EIGHT)
        config = values.model_dump(exclude_unset=True, exclude={"data_path"})
        config |= {"data": entries, "eval_data": [held_out]}
        eval_loss.append(train(TrainConfig.model_validate(config))["eval_loss"])
    one, two = (tensors_of(tmp_path / kind / "final") for kind in ("off", "disk"))
    for name in two:  # a step with the text has seven images
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert eval_loss[0] == pytest.approx(eval_loss[1], rel=1e-5)
    assert num_computed() == [16 + 8 + 8]


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_a_tower_that_learns_is_refused(tiny_llava: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = {"model_name_or_path": str(tiny_llava), "data_path": str(data), "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe) + "train_type: full\ncache_vision_features: disk\n")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "the vision tower learns under train_type full" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe) + "cache_vision_features: off\nmax_steps: -1\n")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    told = capsys.readouterr().err
    assert "max_steps" in told and "cache_vision_features" not in told


def test_the_sum_of_a_slot_covers_every_byte(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "file", 2, (2, 3), torch.bfloat16)
    file.open()
    wanted = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert file.read(1) is None
    file.write(1, wanted)
    found = file.read(1)
    assert found is not None and torch.equal(found, wanted) and file.read(0) is None
    content = file.path.read_bytes()
    for at in range(file.slot_bytes, 2 * file.slot_bytes):
        file.path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert file.read(1) is None
    file.close()
