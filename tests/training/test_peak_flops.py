"""The rate that MFU is measured against: by name, or the best of several products."""

import time
from pathlib import Path

import pytest
import torch

from llavaforge.training import peak_flops as module
from llavaforge.training.metrics import read_metrics
from llavaforge.training.peak_flops import known_flops, measured_flops
from llavaforge.training.run import train
from train_tools import train_config

NAMES = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H20": 148.0,
    "NVIDIA H800": 989.4,
    "NVIDIA GB200": 2500.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.1,
    "NVIDIA L40S": 362.1,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "AMD Instinct MI300X": 1307.4,
}


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_known_by_the_words_of_their_names(name: str) -> None:
    assert known_flops(name, torch.bfloat16) == pytest.approx(NAMES[name] * 1e12)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
     "Tesla V100-SXM2-16GB", "Quadro RTX 6000", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"],
)  # fmt: skip
def test_other_cards_are_measured(name: str) -> None:
    assert known_flops(name, torch.bfloat16) is None


def test_other_types_are_measured() -> None:
    assert known_flops("NVIDIA A100-SXM4-80GB", torch.float32) is None


def test_one_slow_product_is_not_taken_for_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, product = [], module._product_flops

    def cold(device: torch.device, dtype: torch.dtype, size: int) -> float:
        sizes.append(size)
        return 1e9 if len(sizes) == 1 else product(device, dtype, size)

    monkeypatch.setattr(module, "_product_flops", cold)
    measured_flops(torch.device("cpu"), torch.float32)
    assert set(sizes) == {256, 1536}


def test_a_processor_without_units_for_a_type_is_measured_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_product_flops", lambda *_: 2e9)
    begin = time.monotonic()
    assert measured_flops(torch.device("cpu"), torch.bfloat16) == 2e9
    assert time.monotonic() - begin < 1


def test_a_peak_that_a_step_passes_is_raised_and_doubted_aloud(
    tiny_llava: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llavaforge.training.step.peak_flops", lambda *_: 1.0)
    result = train(train_config(tiny_llava, shapes / "train", tmp_path / "run", max_steps=4))
    assert 0 < result["mfu"] <= 1
    assert max(line["mfu"] for line in read_metrics(tmp_path / "run")) == 1
    assert "more than the peak of 1" in caplog.text
