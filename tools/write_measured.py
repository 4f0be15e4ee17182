"""Writes `docs/measured.md`, the tables of what was measured, from the files of `bench/results/`.

    python -m tools.write_measured

Run it after a new measurement; a test compares.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "measured.md"

_RACES = (
    "2026-11-26-cpu-amx-bf16",
    "2026-11-26-cpu-amx-bf16-not-compiled",
    "2026-11-26-cpu-amx-bf16-trl",
    "2026-11-26-cpu-f32-captions",
    "2026-11-26-cpu-f32-instructions",
    "2026-11-26-vocabulary-cpu",
)
_GPU, _DATA, _FEATURES, _SOAK = (
    "2026-11-26-gpu-h200",
    "2026-11-26-data-cpu",
    "2026-11-26-features-cpu",
    "2026-11-26-soak",
)
_OPENING = """# What was measured

Every figure on this page comes from a file of [bench/results](../bench/results), which has the machine, the versions,
the spread over repeats and a digest of the source that was measured; `python -m tools.write_measured` writes the page
from them. In training, the usual way is transformers' `Trainer` with its own collator; on the GPU at its best batch.
Both sides take turns within one run, on the same samples, and their losses must agree.

| what | where |
|---|---|
| speed of training, of data, of answers | below |
| memory per GPU, by train type and DeepSpeed stage | [scaling.md](scaling.md#which-stage-memory-per-gpu) |
| forecasts beside published runs | [scaling.md](scaling.md#will-it-fit-how-long-will-it-take) |
| faults, how often the run came through, and the tests that show it | [reliability.md](reliability.md) |
| other people's programs on our exports | [using.md](using.md) |
| what did not help | [LOG.md](../LOG.md) |
"""

Row = Sequence[str]


def page() -> str:
    """Return the page."""
    parts = [_OPENING, _gpu(_read(_GPU))]
    parts += [_races([(name, _read(name)) for name in _RACES]), _data(_read(_DATA)), _features(_read(_FEATURES))]
    return "\n".join([*parts, _answers(), _soak(_read(_SOAK))])


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(head: str, rows: Iterable[Row]) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _section(title: str, text: str, head: str, rows: Iterable[Row]) -> str:
    return f"## {title}\n\n{text}\n\n{_table(head, rows)}"


def _file(name: str) -> str:
    return f"[{name}](../bench/results/{name}.json)"


def _machine(machine: dict[str, Any]) -> str:
    libraries = machine["libraries"]
    return (
        f"{machine['cores']} cores ({machine['cpu_capability']}), {machine['dtype']}, torch {libraries['torch']}, "
        f"transformers {libraries['transformers']}"
    )


def _gpu(result: dict[str, Any]) -> str:
    """Each way of ours beside the best that the usual way did for the same train type."""
    usual = {row["train_type"]: row for row in result["rows"] if row["side"] == "usual"}
    rows = []
    for row in result["rows"]:
        marks = [row["deepspeed"], row["compile"] and "compiled", row["liger"] and "liger"]
        way = "the usual way" if row["side"] == "usual" else ", ".join(mark for mark in marks if mark) or "plain"
        other = usual.get(row["train_type"])
        ratio = f"{row['samples_per_s'] / other['samples_per_s']:.2f}" if other and other is not row else ""
        batch = f"{row['num_micro_batches']} x {row['num_samples']}"
        memory = f"{row['peak_memory_bytes'] / 1e9:.0f} GB"
        rows.append([row["train_type"], way, batch, f"{row['samples_per_s']:.1f}", ratio, f"{row['mfu']:.0%}", memory])
    device, versions = result["machine"]["devices"][0]["name"], result["machine"]["libraries"]
    text = (
        f"One {device}, torch {versions['torch']}, transformers {versions['transformers']}; CLIP-L/336 + Qwen1.5-4B "
        "with random weights,\nsamples of 600 to 640 tokens (`make bench-gpu`). MFU is of the data sheet's 989 TFLOP/s "
        "in bfloat16."
    )
    head = "train type | way | micro-batches x samples | samples/s | times the usual way | MFU | peak memory"
    return _section("Training on a GPU", text, head, rows)


def _races(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    rows = []
    for name, result in results:
        for scenario in result["scenarios"]:
            ours = scenario["sides"]["ours"]
            for side, speedup in scenario["speedup"].items():
                theirs = scenario["sides"][side]
                memory = theirs["peak_memory_bytes"] / ours["peak_memory_bytes"]
                rows.append(
                    [
                        f"{scenario['data']}, {scenario['train_type']}",
                        _SIDES[side],
                        f"{result['machine']['dtype']}, vocabulary {result.get('vocab_size', 6170):,}",
                        "yes" if result["compiled"] else "no",
                        f"{speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f})",
                        f"{memory:.2f}",
                        _file(name),
                    ]
                )
    text = (
        "A replica with the real model's shares of work per part at a 120th of its parameters, images of 576 tokens;\n"
        f"{_machine(results[0][1]['machine'])};\nmedians and extremes of pairs (`make bench`). `workers`: with loader "
        "workers, as ours has them."
    )
    head = "data, train type | beside | with | our layers compiled | times as fast | times less memory | file"
    return _section("Training on a CPU", text, head, rows)


_SIDES = {"usual": "`Trainer`", "usual_workers": "`Trainer`, workers", "trl": "TRL's `SFTTrainer`"}


def _data(result: dict[str, Any]) -> str:
    images, records = result["images"], result["records"][0]
    rows = [
        ["images decoded and preprocessed, per second and core", f"{images['ours_images_per_s']:.0f}"],
        ["times transformers' Pillow processor, with equal pixels", f"{images['ratio']['median']:.2f}"],
        ["an image from a zip, times one from a folder", f"{result['zip_over_folder']['median']:.2f}"],
        [f"{records['records']:,} records prepared", f"{records['prepare_s']:.0f} s"],
        ["memory of that", f"{records['peak_pss_mb']:,.0f} MB"],
        ["opened again", f"{records['open_s']:.2f} s"],
        ["a sample at a random place", f"{records['random_access_us']:.0f} us"],
    ]
    return _section("Data", f"{_machine(result['machine'])} (`make bench-data`).", "what | ", rows)


def _features(result: dict[str, Any]) -> str:
    titles = {"half-billion": "CLIP-L/336 and Qwen2.5-0.5B", "four-billion": "CLIP-L/336 and Qwen1.5-4B"}
    rows = [
        [
            f"shares of {titles[name]}",
            f"{one['times_as_fast']:.2f} ({one['quartiles'][0]:.2f} to {one['quartiles'][1]:.2f})",
            f"{one['by_flops']:.2f}",
        ]
        for name, one in result["sizes"].items()
    ]
    text = (
        "`cache_vision_features`, stage 1, a micro-step with kept features beside one with the tower\n"
        f"(`make bench-features`); {_machine(result['machine'])}, other work beside it."
    )
    return _section("Kept vision features", text, "model | times as fast (quartiles) | by FLOPs", rows)


def _answers() -> str:
    """The newest measurements of `bench/evaluate.py`."""
    rows = []
    for path in sorted(RESULTS.glob("*-evaluate*.json")):
        one = json.loads(path.read_text())
        ratio = f"{one['times_as_fast']:.2f} ({one['least_and_most'][0]:.2f} to {one['least_and_most'][1]:.2f})"
        tokens = f"{one['answer_tokens'] / one['num_samples']:.0f}"
        answers = f"{one['same_answers']} of {one['num_samples']}"
        rows.append([one["model"], tokens, answers, ratio, _file(path.stem)])
    text = (
        "`evaluate` in batches of 16 beside a loop of plain `generate`, one at a time, from opening model and data\n"
        "to the last answer; `evaluate` measures the held-out loss as well and writes its page.\n"
        "Both in float32 (`make bench-evaluate`). "
        "On a CPU image tokens cost what they cost, batch or not; batches save Python and passes over weights."
    )
    return _section("Answers", text, "model | tokens per answer | same answers | times as fast | file", rows)


def _soak(result: dict[str, Any]) -> str:
    events = ", ".join(f"{name} {number}" for name, number in result["events"].items())
    rows = [
        ["starts of runs", f"{result['starts']}, {result['events']['nothing']} of them left alone"],
        ["steps that were lost and done again, of all steps", f"{result['lost_steps']} of {result['steps']:,}"],
        ["processes, files left behind", f"{result['leaked_processes']}, {result['leftover_files']}"],
        ["median time from a start to the next step", f"{result['median_recovery_s']} s"],
        ["runs that did not end as an undisturbed one", f"{len(result['failures'])} of {result['finished_runs']}"],
    ]
    return _section(
        "Soak", f"{result['minutes']:.0f} minutes of two processes (`make soak`): {events}.", "what | ", rows
    )


if __name__ == "__main__":
    PAGE.write_text(page())
