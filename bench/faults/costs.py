"""What a kill costs: the time to the next step, and the share of a run that is spent saving."""

import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from llavaforge import customize_model, make_shapes, train
from llavaforge.training.metrics import read_metrics


def measure_costs(folder: Path, save_steps: int = 50) -> dict[str, Any]:
    """Kill a run of quickstart's parts, and measure how soon the next step comes and what saving costs."""
    starter = files("llavaforge") / "starter"
    tower, language_model = str(starter / "small-clip"), str(starter / "small-qwen2")
    customize_model(vision_tower=tower, language_model=language_model, output_dir=folder / "model")
    make_shapes(output_dir=folder / "data", num_samples=200, seed=0)
    flags = [
        f"--model_name_or_path={folder / 'model'}", f"--data_path={folder / 'data' / 'train'}", "--train_type=full",
        f"--output_dir={folder / 'run'}", "--global_batch_size=8", f"--save_steps={save_steps}", "--bf16=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "llavaforge", "train", *flags, "--max_steps=1000000"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not any(line["step"] > 2 * save_steps for line in read_metrics(folder / "run")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.stat().st_ino
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while metrics.stat().st_ino == before:  # written anew, without the steps that are done again
            assert process.poll() is None
            time.sleep(0.02)
        kept = len(read_metrics(folder / "run"))
        while len(read_metrics(folder / "run")) <= kept:
            assert process.poll() is None
            time.sleep(0.02)
        recovery_s = time.monotonic() - killed_s
        os.killpg(process.pid, signal.SIGKILL)
    saves = _time_saves(folder, save_steps)
    return {"recovery_s": recovery_s, "save_steps": save_steps, **saves}


def _time_saves(folder: Path, save_steps: int) -> dict[str, float]:
    begin = time.perf_counter()
    train(
        model_name_or_path=folder / "model", data_path=folder / "data" / "train", output_dir=folder / "timed",
        train_type="full", global_batch_size=8, save_steps=save_steps, max_steps=3 * save_steps, bf16=False,
        dataloader_num_workers=0,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    spent = [line["save_time_s"] for line in read_metrics(folder / "timed") if "save_time_s" in line]
    return {"share_saving": sum(spent) / seconds, "save_s": sum(spent) / 3}
