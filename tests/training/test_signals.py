"""A signal stops a run at once while it gets ready, and where it is saved while it trains."""

import os
import signal

import pytest

from llavaforge import cli
from llavaforge.errors import StoppedEarly
from llavaforge.training.signals import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_at_once_before_training_and_later_within(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop, pytest.raises(StoppedEarly) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == stop.exit_code == code
    with StopRequest() as stop:
        with stop.postponed():
            os.kill(os.getpid(), number)
            assert stop.exit_code == code
        assert "asked to stop" in capsys.readouterr().err
        with pytest.raises(StoppedEarly):
            stop.check()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_does_not_wait() -> None:
    with StopRequest() as stop, stop.postponed():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_while_torch_is_imported_is_answered_as_later(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_load", lambda _: os.kill(os.getpid(), number))  # what imports the training run
    before = signal.getsignal(number)
    assert cli.main(["train", "--model_name_or_path=m", "--data_path=d", "--output_dir=o"]) == code
    assert "start again to go on" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_signal_that_comes_while_the_process_ends_changes_nothing() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        with StopRequest(is_last=True):
            pass
        for number in before:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
