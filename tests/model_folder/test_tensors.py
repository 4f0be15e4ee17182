import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llavaforge.errors import UserError
from llavaforge.model_folder import tensors
from llavaforge.model_folder.tensors import open_pickle, open_tensors, write_shards

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5, 3).to(torch.bfloat16),
    "c": torch.randn(7).to(torch.float16),
    "d": torch.tensor(3, dtype=torch.int64),
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found.shape(name) == tuple(tensor.shape) and found.dtype(name) == tensor.dtype


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_conversion_by_blocks_equals_conversion_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", 12)
    monkeypatch.setattr(tensors, "_REMAP_BYTES", 12)
    if kind == "bin":
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    else:
        write_shards(tmp_path, "model", TENSORS.items())
    files = open_tensors(tmp_path)
    for name, tensor in TENSORS.items():
        for dtype in (torch.float32, torch.bfloat16):
            assert files.converted(name, dtype).dtype == dtype
            assert torch.equal(files.converted(name, dtype), tensor.to(dtype)), name


def test_small_sets_make_one_file_with_huggingface_s_name_and_format(tmp_path: Path):
    assert write_shards(tmp_path, "model", TENSORS.items()) == [tmp_path / "model.safetensors"]
    assert_same(open_tensors(tmp_path), TENSORS)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_named_and_indexed_as_huggingface_does(tmp_path: Path):
    paths = write_shards(tmp_path, "trainable", TENSORS.items(), max_shard_bytes=80)
    assert [path.name for path in paths] == [
        "trainable-00001-of-00002.safetensors",
        "trainable-00002-of-00002.safetensors",
    ]
    index = json.loads((tmp_path / "trainable.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"]["a"] == paths[0].name and index["weight_map"]["d"] == paths[1].name
    assert_same(open_tensors(tmp_path, "trainable"), TENSORS)


def test_writing_holds_one_shard_at_most(tmp_path: Path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for number in range(12):
            tensor = torch.zeros(100)
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    write_shards(tmp_path, "model", stream(), max_shard_bytes=800)
    assert most <= 3  # two make a shard, and one is on its way
    assert len(list(tmp_path.glob("*.safetensors"))) == 6


def test_pytorch_bin_is_read_whole_and_in_shards(tmp_path: Path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert_same(open_tensors(tmp_path), TENSORS)
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(TENSORS)
    for number, shard in enumerate((names[:2], names[2:])):
        torch.save({name: TENSORS[name] for name in shard}, tmp_path / f"part{number}.bin")
    weight_map = {name: f"part{number // 2}.bin" for number, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(open_tensors(tmp_path), TENSORS)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match=r"pytorch_model.bin: holds more than tensors"):
        open_tensors(tmp_path)
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match=r"pytorch_model.bin: holds more than tensors"):
        open_pickle(path)
    assert not (tmp_path / "was-run").exists()
    torch.save({"a": {"b": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="dict from name to tensor"):
        open_tensors(tmp_path)


def test_damage_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no weights"):
        open_tensors(tmp_path)
    paths = write_shards(tmp_path, "model", TENSORS.items(), max_shard_bytes=80)
    paths[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: missing"):
        open_tensors(tmp_path)
    paths[1].write_bytes(paths[0].read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: not a readable"):
        open_tensors(tmp_path)
    save_file({"a": torch.zeros(1)}, paths[1])
    with pytest.raises(UserError, match="`a` is both in"):
        open_tensors(tmp_path)
