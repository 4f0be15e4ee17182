"""The records behind rows are those of the rows, as they were cut, also where an image is gone by now."""

import json
import shutil
from pathlib import Path

import numpy as np

from llavaforge.config.schema import DataEntry, SampleOptions
from llavaforge.data.index.open import open_index
from llavaforge.data.index.records import records_of_rows
from llavaforge.model.load import LoadedModel


def test_rows_of_several_data_sets_give_their_records_in_the_order_asked(
    loaded_llava: LoadedModel, shapes: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shapes / "heldout", tmp_path / "data"))
    rows = json.loads((folder / "chat.json").read_text())[:9]
    rows[2]["conversations"][1]["value"] = ""  # faulty: it has no row, and those after it have other numbers
    (folder / "chat.json").write_text(json.dumps(rows))
    entries = [DataEntry(path=folder / "chat.json"), DataEntry(path=folder / "questions.json", max_samples=5)]
    options = SampleOptions(cache_dir=tmp_path / "cache")
    index = open_index(entries, loaded_llava.processor, loaded_llava.num_image_tokens, options, quiet=True)
    assert len(index) == 8 + 5
    (folder / "images" / rows[3]["image"]).unlink()
    questions = json.loads((folder / "questions.json").read_text())
    expected = {0: rows[0], 2: rows[3], 7: rows[8], 8: questions[0], 12: questions[4]}
    for numbers in ([12, 2, 8, 0, 7], np.array([0, 2, 7, 8, 12])):
        found = records_of_rows(index, numbers)
        assert [record.id for record in found] == [expected[int(number)]["id"] for number in numbers]
        for number, record in zip(numbers, found, strict=True):
            assert record.turns[-1].text == expected[int(number)]["conversations"][-1]["value"]
            assert record.images == index.row(int(number)).images
