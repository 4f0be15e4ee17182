"""A process that dies while it takes a tensor's memory from its worker: the worker sees a broken connection."""

import os
import signal
from multiprocessing import current_process, resource_sharer
from multiprocessing.connection import Client, Connection
from typing import Any

from llavaforge.processes import workers


def offer(connection: "Connection[Any, Any]") -> None:
    """Offer a descriptor, as torch does for a tensor in shared memory, and wait."""
    workers.end_with_parent()
    offered = resource_sharer.DupFd(0)
    connection.send(offered._id)  # type: ignore[attr-defined]  # its address and key
    signal.pause()


if __name__ == "__main__":
    context = workers.context()
    ours, its = context.Pipe()
    context.Process(target=offer, args=(its,)).start()
    address, _ = ours.recv()
    taken = Client(address, authkey=current_process().authkey)
    os.kill(os.getpid(), signal.SIGKILL)
