"""`llavaforge demo`: a page in the browser to ask one model, or two side by side, about images.

Comes in: models, held-out data. Goes out: a server, by default for this machine alone, until it is interrupted.
"""

import errno
import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch

from llavaforge.config.schema import DemoConfig
from llavaforge.errors import UserError
from llavaforge.inference.conversation import open_answerer
from llavaforge.inference.demo.samples import held_out
from llavaforge.inference.demo.sessions import Models

logger = logging.getLogger(__name__)


def demo(config: DemoConfig) -> None:
    """Serve the page until ctrl-C or SIGTERM.

    Raises:
        UserError: the extra is not installed, the address is taken, or a model or the data is at fault.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("demo needs Gradio: pip install 'llavaforge[demo]'.")
    _check_address(config.host, config.port)
    samples = [] if config.eval_data_path is None else held_out(config)
    names = [config.model_name_or_path, *([config.compare_with] if config.compare_with else [])]
    answerers = [
        open_answerer(name, base, config.system_prompt, config.max_new_tokens, config.temperature)
        for name, base in zip(names, [config.base_model, config.compare_base_model], strict=False)
    ]
    torch.manual_seed(config.seed)
    with _uploads():
        from llavaforge.inference.demo.page import serving

        with Models(_titles(names), answerers) as models, serving(models, samples, config) as address:
            logger.info("Open %s in a browser; ctrl-C ends the demo.", address)
            if config.host not in ("127.0.0.1", "localhost", "::1"):
                logger.warning("whoever reaches %s over the network may ask, too: there is no password", config.host)
            _wait()


def _titles(names: list[str]) -> list[str]:
    """Return models' names, short where they still differ."""
    short = ["/".join(Path(name).parts[-2:]) for name in names]
    return short if len(set(short)) == len(names) else names


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
            one.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use. Give another --port, or end what uses it.") from None
        raise UserError(
            f"cannot serve at {host}, port {port} ({error.strerror}). Give a --host of this machine (127.0.0.1 for it "
            "alone, 0.0.0.0 for the network) and a --port from 1024 on."
        ) from None


@contextmanager
def _uploads() -> Iterator[None]:
    """Keep uploaded images in a folder that ends with the demo, and Gradio from calling out or serving other files."""
    with tempfile.TemporaryDirectory(prefix="llavaforge-demo-") as folder:
        os.environ.pop("GRADIO_ALLOWED_PATHS", None)
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        without_proxy = [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"]  # Gradio looks at its own page
        os.environ["NO_PROXY"] = ",".join(filter(None, without_proxy))
        yield


def _wait() -> None:
    """Return at ctrl-C or SIGTERM."""
    ended = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with suppress(KeyboardInterrupt):
        ended.wait()
