"""Workers keep no more packs ready than shared memory holds."""

import shutil
from pathlib import Path

import pytest

from llavaforge.data.load.loader import loading
from llavaforge.data.order.plan import MicroBatch
from llavaforge.errors import UserError
from llavaforge.model.load import LoadedModel
from train_tools import open_packs, train_config

NUM_WORKERS = 2
SOURCES = [MicroBatch(0, (number, number + 1), True, 0) for number in range(0, 12, 2)]


def load(loaded: LoadedModel, shapes: Path, num_free: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Load packs where so many packs' bytes of shared memory are free; return the samples of each pack."""
    _, dataset = open_packs(loaded, train_config(loaded.path, shapes / "train", Path("unused")))
    usage, free = shutil.disk_usage("/dev/shm"), int(num_free * 2 * dataset.preprocessing.blank().nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with loading(dataset, iter(SOURCES), NUM_WORKERS, pin_memory=False) as packs:
        return [pack.source.samples for pack in packs]


@pytest.mark.parametrize(("num_free", "told"), [(100, ""), (9, "each worker keeps 2 ready instead of 4")])
def test_fewer_packs_are_kept_ready_where_shared_memory_is_small(
    num_free: float, told: str, loaded_llava: LoadedModel, shapes: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert load(loaded_llava, shapes, num_free, monkeypatch) == [source.samples for source in SOURCES]
    assert told in caplog.text and bool(caplog.text) == bool(told)


def test_shared_memory_without_room_for_a_pack_is_refused_with_the_way(
    loaded_llava: LoadedModel, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"/dev/shm: 0 MB are free.*--shm-size=8g.*--dataloader_num_workers"):
        load(loaded_llava, shapes, 1.5, monkeypatch)


def test_no_pack_at_all_is_no_fault(loaded_llava: LoadedModel, shapes: Path) -> None:
    _, dataset = open_packs(loaded_llava, train_config(loaded_llava.path, shapes / "train", Path("unused")))
    with loading(dataset, iter(()), NUM_WORKERS, pin_memory=False) as packs:
        assert list(packs) == []
