"""Prepared data that is damaged: noticed when it is opened, and made anew."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavaforge.config.schema import SampleOptions
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.index.open import open_index
from llavaforge.model.load import LoadedModel
from mutations import draw_damaged


def contents(index: SampleIndex) -> list[tuple[object, ...]]:
    return [(*row[:5], row.ids.tolist(), row.supervised_spans.tolist(), row.length) for row in map(index.row, range(9))]


@pytest.fixture(scope="module")
def prepared(loaded_llava: LoadedModel, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache") / "cache"
    opened(loaded_llava, shapes, cache)
    return cache


def opened(loaded: LoadedModel, shapes: Path, cache: Path) -> SampleIndex:
    options = SampleOptions(cache_dir=cache)
    return open_index(shapes / "train", loaded.processor, loaded.num_image_tokens, options, quiet=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happened_to_prepared_data_the_same_samples_are_read(
    prepared: Path, loaded_llava: LoadedModel, shapes: Path, tmp_path: Path, data: st.DataObject
) -> None:
    cache = tmp_path / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(prepared, cache)
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size)
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        if data.draw(st.integers(0, 4)):
            is_json = path.suffix in (".json", ".crc32")
            path.write_bytes(draw_damaged(data, path.read_bytes(), is_json))
        else:
            os.unlink(path)
    assert contents(opened(loaded_llava, shapes, cache)) == contents(opened(loaded_llava, shapes, prepared))
