"""The ways in which llavaforge stops on purpose, and the one place where others' errors become the user's.

`cli.main` turns them into exit codes.
"""

import errno
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """The user's input is at fault (exit code 2, no traceback).

    The one argument is the whole message: what is wrong, where, what is allowed and how to fix it.
    It stays a single string so that the error survives the way back from a worker process.
    """

    exit_code = 2


class RunFailed(UserError):
    """A run cannot go on, and neither its input nor our code is known to be at fault (exit code 1, no traceback)."""

    exit_code = 1


class StoppedEarly(BaseException):
    """The run was asked to stop and saved a checkpoint first (exit code 75, or 130 when stopped by hand).

    A signal may raise it anywhere, also where a library catches every `Exception`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EndedElsewhere(Exception):
    """Another process of the run met the fault and told the user; this one ends with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process ended the run with exit code {exit_code}")
        self.exit_code = exit_code


_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, or name a folder elsewhere.",
    errno.EDQUOT: "The disk quota is used up: free some space, or name a folder elsewhere.",
    errno.EFBIG: "The file would be larger than the system allows here (ulimit -f, or the file system).",
    errno.EROFS: "The file system is read-only: name a folder elsewhere.",
    errno.EACCES: "Change the permissions, or name another.",
    errno.EPERM: "Change the permissions, or name another.",
    errno.EIO: "The disk or the network drive fails: look at the system's log, and try again.",
    errno.ESTALE: "The network drive was mounted anew: try again.",
    errno.ENOENT: "Check the name, and that its folder has not been moved or deleted.",
    errno.ENOTDIR: "A file is where a folder is needed: check the name.",
    errno.EISDIR: "A folder is where a file is needed: check the name.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ELOOP: "A link points to itself.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}
_LONGEST_REASON = 300  # characters of others' messages


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """While a file of the user's is read, whatever fails is a fault of that file.

    Args:
        path: the file or folder.
        remedy: what to do about it.

    Raises:
        UserError: names the file and the reason.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}). {remedy}") from error


def reason(error: BaseException) -> str:
    """Return an error of others in one line."""
    if problems := getattr(error, "errors", None):  # pydantic's, in its own many lines
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}, found {one['input']!r:.80}" for one in problems()]
        return "; ".join(line.removeprefix(": Value error, ") for line in lines)[:_LONGEST_REASON]
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    short = text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
    return f"{kind}: {short}" if text else kind


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory, the device's or the host's, is used up."""
    words = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA's, and two of torch's on a CPU
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def as_user_error(error: OSError) -> UserError | None:
    """Return a system's error about a path of the user's as theirs; None when it is about our own code's files."""
    if error.filename is None or isinstance(error, ConnectionError | InterruptedError):
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    code = [str(Path(__file__).parent), *(sysconfig.get_path(name) or "" for name in ("stdlib", "purelib", "platlib"))]
    if any(folder and Path(path).is_relative_to(folder) for folder in code):
        return None
    remedy = _REMEDIES.get(error.errno or 0, "Check the file and its folder.")
    return UserError(f"{path}: {error.strerror or type(error).__name__}. {remedy}")
