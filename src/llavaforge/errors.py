"""The ways in which llavaforge stops on purpose. `cli.main` turns them into exit codes."""


class UserError(Exception):
    """The user's input is at fault (exit code 2, no traceback).

    The one argument is the whole message: what is wrong, where, what is allowed and how to fix it.
    It stays a single string so that the error survives the way back from a worker process.
    """

    exit_code = 2


class StoppedEarly(Exception):
    """The run was asked to stop and saved a checkpoint first (exit code 75, or 130 when stopped by hand)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EndedElsewhere(Exception):
    """Another process of the run met the fault and told the user; this one ends with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process ended the run with exit code {exit_code}")
        self.exit_code = exit_code
