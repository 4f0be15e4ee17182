"""One process of `bench/data/run.py`: prepares records of CC3M's kind, opens them again, reads them, loads them.

Comes in: folder and cache as arguments. Prints one JSON object. A process of its own, so that memory is that of this
work and of its workers alone.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bench.data.qwen import qwen_tokenizer
from llavaforge.config.schema import DataEntry
from llavaforge.data.index.index import DataSetIndex, SampleIndex
from llavaforge.data.index.prepare import prepared
from llavaforge.data.load.loader import PackDataset, loading
from llavaforge.data.order.plan import MicroBatch
from llavaforge.data.pixels.preprocessing import Preprocessing
from llavaforge.data.rows.sources import find_source
from llavaforge.data.text.sample import SampleBuilder
from llavaforge.data.text.template import ChatTemplate

NUM_IMAGE_TOKENS, SIZE = 576, 336
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
_NUM_READS, _BATCH = 50_000, 8


class PeakMemory:
    """The largest proportional set size (PSS) of this process and its children while a block runs.

    PSS counts a page that n processes share as a n-th in each, so the sum is what the machine has to hold. Pages of
    mapped files are in it, though the system may drop them at any time.
    """

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for one in (process, *process.children(recursive=True)):
                try:
                    total += one.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, total)


def main() -> None:
    """Measure."""
    folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
    entry, builder = DataEntry(path=folder), _builder()
    with PeakMemory() as memory:
        begin = time.perf_counter()
        prepared(find_source(entry, cache), builder, cache, quiet=False)
        prepare_s = time.perf_counter() - begin
    begin = time.perf_counter()
    source = find_source(entry, cache)
    path, fingerprint = prepared(source, builder, cache, quiet=False)
    index = SampleIndex((DataSetIndex(path, source, fingerprint),))
    opened = len(index.lengths)
    open_s = time.perf_counter() - begin
    result: dict[str, Any] = {
        "records": opened,
        "faults": len(index.data_sets[0].faults),
        "prepare_s": prepare_s,
        "peak_pss_mb": memory.bytes / 1e6,
        "index_mb": path.stat().st_size / 1e6,
        "open_s": open_s,
        "random_access_us": _random_access(index),
        "worker_uss_mb": _worker_memory(index, builder),
    }
    print(json.dumps(result))


def _builder() -> SampleBuilder:
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.eos_token = "<|im_end|>"
    chat = ChatTemplate(tokenizer, CHATML, "chat", None)
    return SampleBuilder(tokenizer, chat, tokenizer.convert_tokens_to_ids("<image>"), NUM_IMAGE_TOKENS, 2048)


def _random_access(index: SampleIndex) -> float:
    """Return the mean time of one sample without its image, in microseconds; the first reads map the file's pages."""
    numbers = np.random.default_rng(0).integers(0, len(index), _NUM_READS).tolist()
    begin = time.perf_counter()
    for number in numbers:
        index.row(number)
    return (time.perf_counter() - begin) / len(numbers) * 1e6


def _anonymous(pid: int) -> int:
    """Return a process's own bytes without pages of files (USS counts those of the index that it alone has touched)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def _worker_memory(index: SampleIndex, builder: SampleBuilder) -> dict[str, float]:
    """Return megabytes that loader workers have for themselves alone (USS), after many packs with images."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    dataset = PackDataset(index, Preprocessing.of(processor), builder.image_token_id, NUM_IMAGE_TOKENS)
    numbers = np.random.default_rng(1).permutation(len(index))[: 200 * _BATCH].reshape(-1, _BATCH).tolist()
    order = [MicroBatch(0, tuple(batch), True, 0) for batch in numbers]
    with loading(dataset, order, num_workers=3, pin_memory=False) as packs:
        for _ in range(len(order) * 3 // 4):
            next(packs)
        children = psutil.Process().children(recursive=True)
        workers = [child for child in children if child.name() == "pt_data_worker"]
        memory = [worker.memory_full_info() for worker in workers]
        anonymous = [_anonymous(worker.pid) for worker in workers]
    return {
        "mean": sum(info.uss for info in memory) / len(memory) / 1e6,
        "largest": max(info.uss for info in memory) / 1e6,
        "largest_without_file_pages": max(anonymous) / 1e6,
        "resident_mean": sum(info.rss for info in memory) / len(memory) / 1e6,
    }
