"""Without a terminal, long work tells now and then how far it is and how long it will take."""

import time

import pytest

from llavaforge.progress import Bar


def test_log_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO")
    clock = iter([100.0, 101.0, 111.0, 120.0, 121.0, 200.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Bar("start") as bar:  # at 100 s
        for tenths in (1, 5, 7, 8, 10):
            bar.update(tenths / 10, f"{tenths} of 10, ")
    assert caplog.messages == ["5 of 10, 11 s left", "8 of 10, 5 s left", "10 of 10, 0 s left"]


@pytest.mark.parametrize(("log_ends", "quiet", "lines"), [(True, False, 2), (False, False, 0), (True, True, 0)])
def test_the_ends(log_ends: bool, quiet: bool, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Bar("start", quiet, done=0.5, log_ends=log_ends) as bar:
        for share in (0.75, 0.8, 1.0):
            bar.update(share, "")
    assert len(caplog.messages) == lines
