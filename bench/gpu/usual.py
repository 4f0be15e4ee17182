"""The usual way on a GPU: Hugging Face's `Trainer` around the whole stock model, padded batches, logits everywhere.

Weights in bfloat16 where they are frozen or LoRA's; float32 with autocast where the language model learns, since
AdamW needs float32 masters. Tried with several batches, of which the fastest counts; recomputation where that fits no
other way. Image and text are made beforehand: only the step is measured.
"""

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.gpu.rows import SIZES, TEXT_TOKENS, USUAL_BATCHES, Row
from llavaforge.data.load.pack import Pack
from llavaforge.device import compute_dtype, pick_device
from llavaforge.engine.plain import peak_memory_bytes
from llavaforge.errors import is_out_of_memory
from llavaforge.machine.random_model import preprocessing, random_model, random_packs, train_options
from llavaforge.model.flops import FlopCounter
from llavaforge.model.tower import normalize
from llavaforge.model.trainable import parameter_groups
from llavaforge.training.peak_flops import peak_flops

_WARMUP, _STEPS = 2, 6

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tried:
    """What one batch came to."""

    num_samples: int
    gradient_checkpointing: bool
    step_s: float
    samples_per_s: float
    mfu: float
    peak_memory_bytes: int


def best(row: Row) -> dict[str, Any]:
    """Return the fastest of all batches, and all of them."""
    tried = []
    for checkpointing in (False, True):
        for num_samples in USUAL_BATCHES:
            try:
                tried.append(_try(row, num_samples, checkpointing))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if tried:
            break
    if not tried:
        return {"error": "out of memory: with every batch"}
    fastest = max(tried, key=lambda one: one.samples_per_s)
    return {**asdict(fastest), "tried": [asdict(one) for one in tried]}


def _try(row: Row, num_samples: int, checkpointing: bool) -> Tried:
    size, device = SIZES[row.size], pick_device()
    low = compute_dtype("auto")
    learns = row.train_type in ("freeze_vision", "full")
    model = random_model(size, device, torch.float32 if learns else low)
    peft = row.train_type == "use_lora"
    if peft:
        from peft import LoraConfig, get_peft_model

        options = train_options("use_lora")
        names = "|".join(options.lora_target_modules)
        flops = _flops(row, low)
        model = get_peft_model(
            model,
            LoraConfig(
                r=options.lora_r,
                lora_alpha=options.lora_alpha,
                target_modules=rf"model\.language_model\..*\.({names})",
                modules_to_save=["multi_modal_projector"],
            ),
        )
    else:
        parameter_groups(model, train_options(row.train_type))
        flops = FlopCounter.of(model, size.num_image_tokens)
    packs = list(random_packs(size, 4, num_samples, TEXT_TOKENS[row.data]))
    samples = [sample for pack in packs for sample in _samples(pack, row)]
    clock = _Clock()
    arguments = TrainingArguments(
        output_dir="usual",
        max_steps=_WARMUP + _STEPS,
        per_device_train_batch_size=num_samples,
        gradient_accumulation_steps=row.num_micro_batches,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=low == torch.bfloat16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    repeated = samples * -(-(_WARMUP + _STEPS) * row.num_micro_batches // len(packs))
    Trainer(model=model, args=arguments, train_dataset=repeated, data_collator=_collate, callbacks=[clock]).train()
    step_s = statistics.median(clock.seconds[_WARMUP:])
    done = sum(flops.step(pack.lengths, pack.num_images, pack.num_supervised) for pack in packs) / len(packs)
    return Tried(
        num_samples,
        checkpointing,
        step_s,
        num_samples * row.num_micro_batches / step_s,
        done * row.num_micro_batches / step_s / peak_flops(device, low),
        peak_memory_bytes(device),
    )


def _flops(row: Row, dtype: torch.dtype) -> FlopCounter:
    model = random_model(SIZES[row.size], torch.device("meta"), dtype)
    parameter_groups(model, train_options(row.train_type))
    return FlopCounter.of(model, SIZES[row.size].num_image_tokens)


def _samples(pack: Pack, row: Row) -> list[Sample]:
    """Return the samples of a pack as the usual collator gets them."""
    pixels = normalize(pack.pixels_ICHW, preprocessing(SIZES[row.size]), torch.float32)
    labels = torch.full_like(pack.ids_T, -100)
    labels[pack.predictors_S + 1] = pack.targets_S
    parts = zip(pack.ids_T.split(pack.lengths), labels.split(pack.lengths), pixels, strict=True)
    return [{"input_ids": ids, "labels": mine, "pixel_values": image} for ids, mine, image in parts]


def _collate(samples: list[Sample]) -> Sample:
    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([one[name] for one in samples], batch_first=True, padding_value=value, padding_side="left")

    ids = padded("input_ids", 0)
    mask = pad_sequence([torch.ones_like(one["input_ids"]) for one in samples], batch_first=True, padding_side="left")
    pixels = torch.stack([one["pixel_values"] for one in samples])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100), "pixel_values": pixels}


class _Clock(TrainerCallback):
    """Times the steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(_now() - self._begin)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
