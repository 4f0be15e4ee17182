"""Where metrics go besides metrics.jsonl. `report_to` chooses by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llavaforge.errors import UserError

Tracker = Callable[[dict[str, Any]], None]


@contextmanager
def open_tracker(name: str, output_dir: Path) -> Iterator[Tracker]:
    """Give a function that takes one line of metrics.

    Args:
        name: `none` or `tensorboard`.
        output_dir: TensorBoard's files go to `output_dir/tensorboard`.

    Raises:
        UserError: the library is not installed.
    """
    if name == "none":
        yield lambda line: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("report_to tensorboard needs TensorBoard: pip install 'llavaforge[tracking]'.") from None
    writer = SummaryWriter(str(output_dir / "tensorboard"))

    def track(line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])

    try:
        yield track
    finally:
        writer.close()
