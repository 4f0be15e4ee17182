"""Ask a server of the OpenAI kind the questions of a file, through its own client: nothing of llavaforge is imported.

    python ask_server.py FOLDER QUESTIONS.json IMAGES NUMBER

Starts `transformers serve` on a free port of this machine, and ends it. Goes out: as from `ask.py`, image first and
last.
"""

import base64
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from openai import APIConnectionError, OpenAI

START_S = 180


def main(folder: Path, questions: Path, images: Path, number: int) -> None:
    """Print the answers."""
    rows = json.loads(questions.read_text())[:number]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=sys.stderr, stderr=sys.stderr)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        wait(client, server)
        answers = {
            f"image {'first' if first else 'last'}, served": [ask(client, folder, row, images, first) for row in rows]
            for first in (True, False)
        }
    finally:
        server.terminate()
        server.wait(30)
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "answers": answers}))


def wait(client: OpenAI, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(0.5)
        except Exception:  # it is there, whatever it says of its models
            return
    raise SystemExit("the server did not start")


def ask(client: OpenAI, folder: Path, row: dict[str, Any], images: Path, first: bool) -> str:
    """Return the greedy answer to a question."""
    encoded = base64.b64encode((images / row["image"]).read_bytes()).decode()
    words = row["conversations"][0]["value"].replace("<image>", "").strip()
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": words},
    ]
    messages: list[Any] = [{"role": "user", "content": content if first else content[::-1]}]
    done = client.chat.completions.create(model=str(folder), messages=messages, temperature=0, max_tokens=16)
    return (done.choices[0].message.content or "").strip()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
