"""The table of faults names tests that are there, and the page is of this table."""

import os
from pathlib import Path

import pytest
from bench.faults.run import PAGE, count, page
from bench.faults.table import CLASSES, FaultClass
from bench.soak import main as soak

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("one", CLASSES, ids=[one.name for one in CLASSES])
def test_every_test_of_the_table_is_there(one: FaultClass) -> None:
    for test in one.tests:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text() if function else (ROOT / file).is_file(), test


def test_the_page_is_of_this_table() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    costs = {"recovery_s": 0.0, "share_saving": 0.0, "save_steps": 0, "save_s": 0.0}
    expected = [line for line in page([(0, 0)] * len(CLASSES), 0, costs).splitlines() if line.startswith("| ")]
    assert [row.split("|")[1:3] for row in rows] == [row.split("|")[1:3] for row in expected]


def test_cases_are_counted_by_file_and_by_function() -> None:
    outcomes = {
        ("tests/a.py", "test_x"): [True, False],
        ("tests/a.py", "test_y"): [True],
        ("tests/b.py", "test_x"): [True],
    }
    assert count(FaultClass("", "", ("tests/a.py",)), outcomes) == (3, 2)
    assert count(FaultClass("", "", ("tests/a.py::test_y", "tests/b.py")), outcomes) == (2, 2)


@pytest.mark.slow
def test_a_soak_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    minutes = 2 if os.environ.get("CI") else 0.5  # who waits for the tests at a desk has not so much time
    code = soak([f"--minutes={minutes}", "--seed=3"])
    assert code == 0, capsys.readouterr().out
