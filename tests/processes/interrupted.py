"""A process that gets ctrl-C while its workers start: `interrupted.py FUNCTION EVENT N`, at its Nth call or return."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from llavaforge.processes import workers

if __name__ == "__main__":
    function, at, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # A library's thread takes the signal that the main thread has blocked.
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    seen = 0

    def interrupt(frame: FrameType, event: str, _: Any) -> None:
        global seen
        seen += event == at and frame.f_code.co_name == function
        if seen == number:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

    sys.setprofile(interrupt)
    try:
        list(workers.each(Path, (str(number) for number in range(100))))
    except KeyboardInterrupt:
        print("interrupted in", function)
