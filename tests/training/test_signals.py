"""A signal stops a run at once while it gets ready, and where it is saved while it trains."""

import os
import signal

import pytest

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
