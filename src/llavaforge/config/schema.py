"""Every option of every verb, once: the command line, the recipes and the Python functions all read these classes.

A docstring under a field is its help text. Unknown keys are errors (`config/load.py` suggests the nearest one).

Past 300 lines because every option stands here, and only here.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from llavaforge.config.train_types import TRAIN_TYPES, TrainType

_LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(gt=0, le=_LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy's generators take
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

COLUMNS = (
    "id", "image", "images", "conversations", "messages", "texts", "system", "question", "answer", "prompt",
    "completion", "caption",
)  # fmt: skip
"""Our names of fields, for those of other names (`DataEntry.columns`)."""

T = TypeVar("T")
_CHANGEABLE = "changeable"
Changeable = Annotated[T, _CHANGEABLE]
"""Of an option of `train` that may change between the starts of one run: it says how the run is carried out, not what
comes of it. All other options of `TrainConfig` identify the run (`identifying`)."""

_MICRO_BATCH = 8
_VARIANT_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")

OF_COMPARISON = {
    "output_dir": "and has a folder for each run",
    "seed": "and goes through `seeds`",
    "stages": "since a variant is one stage",
    **dict.fromkeys(("max_steps", "num_train_epochs"), "by the budget"),
    **dict.fromkeys(("eval_data_path", "eval_data", "validation_split"), "so that losses can be compared"),
    "early_stopping_patience": "which would end a run before its budget",
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), "and takes each run's last model"),
    **dict.fromkeys(("resume_from_checkpoint", "allow_changes"), "since each run goes on from its own checkpoint"),
}
"""Options of `train` that no variant of a comparison may have, and why: `compare` sets them."""

_WEEK_S = 7 * 24 * 3600


def shipped_deepspeed() -> dict[str, Path]:
    """Return the DeepSpeed files that llavaforge brings, by name (`recipes/deepspeed/` in the repository)."""
    folder = Path(__file__).parent.parent / "engine" / "deepspeed"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def has_images_beside(data_path: Path) -> bool:
    """Say whether a data set brings a folder or archive of images of its own."""
    folder = data_path if data_path.is_dir() else data_path.parent
    return any((folder / name).exists() for name in ("images", "images.zip", "images.tar"))


def identifying() -> dict[str, Any]:
    """Return the options that identify a run, each with its default as JSON; an older run lacks the newer ones."""
    defaults = TrainConfig.model_construct().model_dump(mode="json", warnings=False)
    fields = TrainConfig.model_fields.items()
    return {name: defaults.get(name) for name, info in fields if _CHANGEABLE not in info.metadata}


class Schema(BaseModel):
    """Base of all option classes."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, frozen=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_empty_path(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse an empty path, which would mean the current folder."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value == "" and Path in (annotation, *get_args(annotation)):
            raise ValueError("is empty: name a file or folder (`.` is the current folder), or leave it out")
        return value


class CustomizeModelConfig(Schema):
    """Join a vision tower and a language model into one LLaVA folder."""

    vision_tower: str
    """Folder or hub name of a CLIP or SigLIP model (a whole CLIP or its vision part), or of a LLaVA."""
    language_model: str
    """Folder or hub name of a causal language model (Qwen2/2.5/3, Llama, Mistral, Gemma, Phi-3), or of a LLaVA."""
    output_dir: Path = Path("my-model/model-01")
    """Where the joined model is written."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` keeps each part's own bytes (and the language model's type for the projector)."""
    projector_hidden_act: str = "gelu"
    """Activation between the projector's two layers."""
    projector_bias: bool = True
    """Whether the projector's layers have a bias."""
    projector_from: str | None = None
    """A trained projector to start from: a LLaVA folder, a finished run, or LLaVA's `mm_projector.bin`."""
    vision_feature_layer: int = -2
    """Which hidden state of the tower the projector reads (-2: before the last layer, as LLaVA does)."""
    image_aspect_ratio: Literal["crop", "pad"] = "crop"
    """Resize and centre-crop (the tower's own way), or pad to a square first (LLaVA-1.5)."""
    chat_template: Path | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    seed: Seed = 0
    """Seed of the projector's initial weights."""
    overwrite: bool = False
    """Replace a non-empty output folder."""


class MakeShapesConfig(Schema):
    """Write a generated data set of coloured shapes in the layout of LLaVA-CC3M-Pretrain-595K."""

    output_dir: Path
    """Folder to write; it must be empty or absent."""
    num_samples: PositiveInt = 2000
    """Number of training images; a tenth as many (at least 100) are held out."""
    seed: Seed = 0
    """Seed of the generated scenes."""


class DataEntry(Schema):
    """One data set of a mixture: an entry of a recipe's `data` list."""

    path: Path
    """A folder, a file, or a data set's name on the hub."""
    images: Path | None = None
    """Folder, .zip or .tar of its images (default: `images/`, `images.zip` or `images.tar` beside it)."""
    image_roots: list[Path] = []
    """Folders outside of it that links in the image folder may lead to."""
    columns: dict[str, str] = {}
    """The rows' own names of fields: `{image: ..., question: ..., answer: ...}`, where they differ from ours."""
    format: Literal["auto", "llava", "sharegpt", "messages", "texts", "question", "caption"] = "auto"
    """How its rows are written; `auto` tells by their fields."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of the samples, relative to the other weights; an epoch keeps the size of all data together."""
    repeat: Annotated[float, Field(gt=0)] | None = None
    """How often each of its samples comes in an epoch (0.5: half of them, the other half in the next epoch)."""
    max_samples: PositiveInt | None = None
    """Use only the first so many records."""
    split: str | None = None
    """Which split of it, where it has several (default: train)."""

    @model_validator(mode="after")
    def _check(self) -> "DataEntry":
        if self.weight is not None and self.repeat is not None:
            raise ValueError("give weight or repeat, not both")
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise ValueError(f"columns: `{unknown[0]}` is none of our fields, which are {', '.join(COLUMNS)}")
        return self


class SampleOptions(Schema):
    """How a record becomes a sample; shared by `train`, `evaluate` and the `data` verbs."""

    prompt_style: Literal["chat", "plain"] = "chat"
    """`chat`: the model's chat template. `plain`: image and caption without the instruction (LLaVA's stage 1)."""
    system_prompt: str | None = None
    """System message put before each conversation (chat style only)."""
    max_length: PositiveInt = 2048
    """Longest sample in tokens, image tokens included; whole turns are dropped from the end to fit."""
    special_tokens_in_text: Literal["split", "keep"] = "split"
    """The model's special tokens in texts of the data: `split` them into plain text, or `keep` them as they are (boxes,
    points). Those that the chat template writes itself are always split."""
    image_folder: Changeable[Path | None] = None
    """Folder, .zip or .tar of the images of `data_path`; found beside it when not given."""
    image_roots: Changeable[list[Path]] = []
    """Folders outside of the image folder that links in it may lead to."""
    cache_dir: Changeable[Path | None] = None
    """Where prepared data is kept (default: `$LLAVAFORGE_CACHE` or `~/.cache/llavaforge`)."""


OF_HELD_OUT = (SampleOptions.model_fields.keys() - {"cache_dir"}) | {"data_path"}
"""Options of `evaluate` that `held_out` takes from the model's run."""


class LearningOptions(Schema):
    """What learns; shared by all verbs that train or speak of training."""

    train_type: TrainType = "use_lora"
    """What learns. It decides how much work a sample is, and so which samples share a micro-batch."""
    lora_r: Annotated[int, Field(gt=0, le=65_536)] = 128
    """Rank of the LoRA matrices."""
    lora_alpha: PositiveInt = 256
    """LoRA's scale is `lora_alpha / lora_r`."""
    lora_dropout: Fraction = 0.0
    """Dropout before LoRA's first matrix."""
    lora_target_modules: list[str] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    ]  # fmt: skip
    """Names of the language model's linear layers that get a LoRA (names the model lacks are passed over)."""

    @property
    def uses_lora(self) -> bool:
        """Whether a LoRA learns."""
        return TRAIN_TYPES[self.train_type].uses_lora


class BatchOptions(Schema):
    """How many samples a step and a micro-batch hold."""

    global_batch_size: Changeable[PositiveInt | None] = None
    """Samples per optimizer step over all processes; accumulation is derived from it."""
    per_device_train_batch_size: Changeable[PositiveInt | None] = None
    """Most samples in one micro-batch of one process (default: 8, or no bound when `max_tokens_per_batch` is given)."""
    max_tokens_per_batch: Changeable[PositiveInt | Literal["auto"] | None] = None
    """Most tokens in one micro-batch of one process, instead of or besides a number of samples; `auto`: what fits."""
    gradient_accumulation_steps: Changeable[PositiveInt | None] = None
    """Micro-batches per step; with `per_device_train_batch_size` and the processes it gives the global batch."""

    @property
    def most_tokens(self) -> int | None:
        """`max_tokens_per_batch` as a number; None where there is no bound, or none yet (`auto`)."""
        return None if self.max_tokens_per_batch == "auto" else self.max_tokens_per_batch

    @property
    def max_samples_per_batch(self) -> int:
        """Most samples in one micro-batch of one process."""
        if self.per_device_train_batch_size is not None:
            return self.per_device_train_batch_size
        return _LARGEST if self.max_tokens_per_batch else _MICRO_BATCH

    def samples_per_step(self, num_processes: int = 1) -> int:
        """Return the global batch."""
        per_process = self.max_samples_per_batch * (self.gradient_accumulation_steps or 1)
        return self.global_batch_size or per_process * num_processes

    @model_validator(mode="after")
    def _check_batch(self) -> "BatchOptions":
        if self.max_tokens_per_batch and not (self.global_batch_size or self.per_device_train_batch_size):
            raise ValueError("max_tokens_per_batch is about micro-batches only: give global_batch_size too")
        if self.global_batch_size and self.gradient_accumulation_steps:
            raise ValueError(
                "global_batch_size already fixes the accumulation: drop gradient_accumulation_steps, or give only it"
            )
        return self


class EngineOptions(Schema):
    """How a step is computed; shared by `train` and `estimate`."""

    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps AdamW's moments in 8 bits, 2 bytes a parameter instead of 8, so that `full` of a 4B model fits
    one 80 GB card. For a single process without DeepSpeed; needs `pip install 'llavaforge[8bit]'`."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16 with float32 masters; `auto` where the hardware is fast at it."""
    gradient_checkpointing: Changeable[bool | PositiveInt | Literal["auto"]] = "auto"
    """Recompute the language model's layers in the backward pass to save memory: all of them, every N-th one, or
    (`auto`) as few as the device's memory allows."""
    compile: Changeable[bool | Literal["auto"]] = "auto"
    """Compile the layers (torch.compile): steps take less time, the first one a minute more; `auto` in long runs."""
    deepspeed: Changeable[str | None] = None
    """`zero1`, `zero2`, `zero3`, `zero2-offload`, `zero3-offload`, or a DeepSpeed JSON file; several processes default
    to `zero2`, a single one to plain PyTorch."""

    @property
    def recompute_every(self) -> int:
        """`gradient_checkpointing` as a number: every how many layers one is recomputed; 0 for none, or not decided."""
        return 0 if self.gradient_checkpointing == "auto" else int(self.gradient_checkpointing)

    @model_validator(mode="after")
    def _check_engine(self) -> "EngineOptions":
        if self.deepspeed is not None and self.deepspeed not in shipped_deepspeed():
            if not Path(self.deepspeed).is_file():
                names = ", ".join(shipped_deepspeed())
                raise ValueError(f"deepspeed: no such file: {self.deepspeed} (or one of {names})")
        return self


class DataOptions(LearningOptions, BatchOptions, SampleOptions):
    """Which data, and how it is dealt; shared by `train` and the `data` verbs."""

    data_path: Changeable[Path | None] = None
    """Folder, file or hub name: LLaVA/ShareGPT JSON, messages, Parquet, saved data sets, WebDataset (docs/data.md)."""
    data: Changeable[list[DataEntry]] = []
    """Several data sets instead of `data_path`, each with path, images, weight or repeat, max_samples, split."""
    eval_data_path: Changeable[Path | None] = None
    """Held-out data, same kinds as `data_path`; images that are not beside it are looked for in `image_folder`."""
    eval_data: Changeable[list[DataEntry]] = []
    """Several held-out data sets instead of `eval_data_path`, entries as in `data` (without weight and repeat)."""
    validation_split: NonNegativeFloat = 0
    """Records to hold out when there is no `eval_data_path`: a share (below 1) or a number. Never splits an image."""
    quarantine: Changeable[Path | None] = None
    """A list of bad records, as `data check --quarantine` writes it; `train` leaves them out."""

    seed: Seed = 42
    """Seed of the sample order, LoRA's initial weights and dropout."""

    @model_validator(mode="after")
    def _check_data(self) -> "DataOptions":
        if self.data_path is None and not self.data and "data" in self.model_fields_set:
            raise ValueError("`data` is an empty list: name a data set in it (`- path: ...`), or give data_path")
        if self.data_path is None and not self.data:
            raise ValueError("`data_path` is missing: give it in the recipe or as --data_path")
        if self.data_path is not None and self.data:
            raise ValueError("give data_path or data, not both")
        if self.data and self.image_folder:
            raise ValueError("image_folder belongs to data_path: give `images` in the entries of data")
        if len({entry.weight is None for entry in self.data}) > 1:
            raise ValueError("data: give every entry a weight, or none")
        if sum(map(bool, (self.eval_data_path, self.eval_data, self.validation_split))) > 1:
            raise ValueError("give one of eval_data_path, eval_data and validation_split")
        if any(entry.weight is not None or entry.repeat is not None for entry in self.eval_data):
            raise ValueError("eval_data: each record is evaluated once, so weight and repeat have no place")
        if self.validation_split > 1 and self.validation_split % 1:
            raise ValueError("validation_split is a share below 1 or a whole number of records")
        return self

    @property
    def entries(self) -> list[DataEntry]:
        """The data sets to train on."""
        if self.data_path is None:
            return self.data
        return [DataEntry(path=self.data_path, images=self.image_folder, image_roots=self.image_roots)]

    @property
    def eval_entries(self) -> list[DataEntry]:
        """The held-out data sets (none with `validation_split`)."""
        if self.eval_data_path is None:
            return self.eval_data
        images = None if has_images_beside(self.eval_data_path) else self.image_folder
        return [DataEntry(path=self.eval_data_path, images=images, image_roots=self.image_roots)]


class DataCheckConfig(DataOptions):
    """Find what is wrong with a data set before training: every record, every image. Takes a training recipe too."""

    model_name_or_path: str | None = None
    """The model to be trained; without it tokens, lengths and labels are not checked."""
    stage: str | None = None
    """Which stage of a recipe with `stages` (default: the first)."""
    report: Path | None = None
    """Folder for `report.html` and `findings.jsonl`."""
    quarantine: Path | None = None
    """File for the list of bad records, which `train --quarantine` leaves out."""
    check_images: bool = True
    """Decode every image; `false` checks only that they are there."""


class DataPreviewConfig(DataOptions):
    """Show samples as the model sees them: images, supervised tokens, packing. Takes a training recipe too."""

    model_name_or_path: str
    """The model to be trained."""
    stage: str | None = None
    """Which stage of a recipe with `stages` (default: the first)."""
    output: Path | None = None
    """The HTML page to write."""
    num_samples: PositiveInt = 16
    """Number of samples to show, the first ones of the run."""


TrackerName = Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
MetricName = Literal[
    "auto", "none", "vqa", "exact_match", "yes_no", "multiple_choice", "multiple_choice_likelihood", "anls", "cider",
    "bleu",
]  # fmt: skip
VALUES_OF_METRICS: dict[str, tuple[str, ...]] = {
    "yes_no": ("yes_no", "yes_no_precision", "yes_no_recall", "yes_no_f1", "yes_no_yes_rate"),
    "bleu": ("bleu_1", "bleu_2", "bleu_3", "bleu_4"),
}
"""What a metric's values are called, where that is not its name alone."""


class TrainConfig(EngineOptions, DataOptions):
    """Train a LLaVA: one stage, or several under `stages`."""

    model_name_or_path: Changeable[str]
    """Folder (or hub name) of the model to start from: written by customize-model, or any llava-hf style model."""
    output_dir: Changeable[Path]
    """Where checkpoints, metrics and the finished model go."""
    projector_from: Changeable[str | None] = None
    """A trained projector to start from: a LLaVA folder, a finished run, or LLaVA's `mm_projector.bin`."""

    on_bad_sample: Changeable[Literal["stop", "skip"]] = "stop"
    """What to do with a record or image that cannot be read: stop, or leave it out and list it in bad_samples.jsonl."""
    max_bad_samples: Changeable[NonNegativeInt] = 100
    """With `skip`: stop when more than so many were left out."""
    eval_steps: Changeable[NonNegativeInt] = 0
    """Held-out loss every so many steps (0: only at the end)."""
    eval_generate_samples: Changeable[NonNegativeInt] = 0
    """With the held-out loss, answer so many held-out samples, the same each time (`eval_answers.jsonl`)."""
    eval_metrics: Changeable[list[MetricName]] = ["auto"]
    """What is measured of these answers, as in `evaluate --metrics`; in metrics.jsonl under `eval_NAME`."""
    eval_max_new_tokens: Changeable[PositiveInt] = 32
    """Longest answer that is generated for it."""
    metric_for_best_model: Changeable[str] = "eval_loss"
    """What says which step is best: `eval_loss` (lowest), or `eval_NAME` of a metric in `eval_metrics` (highest)."""
    load_best_model_at_end: Changeable[bool] = False
    """Keep a checkpoint of the best evaluation so far, and make it the finished model."""
    early_stopping_patience: Changeable[NonNegativeInt] = 0
    """End the run after so many evaluations in a row without a better one (0: never)."""

    num_train_epochs: Changeable[Annotated[float, Field(gt=0)]] = 1.0
    """Passes over the data (ignored when `max_steps` is given). Raise it to go on with a finished run."""
    max_steps: Changeable[NonNegativeInt] = 0
    """Number of optimizer steps; 0 derives it from `num_train_epochs`. Raise it to go on with a finished run."""
    learning_rate: NonNegativeFloat | None = None
    """Of the language model or its LoRA (of the projector for `projector`). Default 2e-5; LoRA 2e-4; projector 1e-3."""
    projector_learning_rate: NonNegativeFloat | None = None
    """Of the projector (default: `learning_rate`; 2e-5 for `use_lora`)."""
    vision_learning_rate: NonNegativeFloat | None = None
    """Of the vision tower under `full` (default: a tenth of `learning_rate`)."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps with a rising learning rate."""
    warmup_steps: NonNegativeInt | None = None
    """Number of warm-up steps (instead of `warmup_ratio`)."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient to this norm (0: no clipping)."""

    deterministic: Changeable[bool] = False
    """The same bytes from every start on a GPU too, where attention's backward sums in any order; a CPU gives them."""
    stuck_timeout_s: Changeable[Annotated[float, Field(ge=1, le=_WEEK_S)]] = 300.0
    """Seconds after which a run is ended when a process does not answer or gets nowhere, or no image comes."""
    max_skipped_steps: Changeable[NonNegativeInt] = 3
    """Steps in a row that may be skipped because loss or gradient is not finite; after more the run ends."""
    dataloader_num_workers: Changeable[NonNegativeInt] = 2
    """Processes that decode images (0: the training process itself)."""
    cache_vision_features: Changeable[Literal["off", "disk", "memory"]] = "off"
    """Run a frozen vision tower over each image once, before step 1, and keep what it makes of it: in `cache_dir`
    (`disk`) or in the host's memory until the stage ends (`memory`). For small data, many epochs and a small language
    model: all that is saved is the tower's share of a step. With CLIP-L/336 in bfloat16 an image takes 1.2 MB, so
    10,000 take 12 GB, and LLaVA's 595,375 would take 700 GB."""

    save_steps: Changeable[NonNegativeInt] = 500
    """A checkpoint every so many steps (0: none); training goes on while it is written."""
    save_total_limit: Changeable[PositiveInt] = 2
    """Newest checkpoints kept."""
    on_save_error: Changeable[Literal["stop", "continue"]] = "stop"
    """When a checkpoint cannot be saved (the disk is full): stop the run, or go on without it."""
    logging_steps: Changeable[PositiveInt] = 1
    """A line of metrics.jsonl every so many steps."""
    report_to: Changeable[list[TrackerName]] = ["none"]
    """Where metrics go besides metrics.jsonl and report.html; several names, or one."""
    profile: Changeable[bool] = False
    """Record steps 3 to 5: a trace for Perfetto and a table of operations go to `output_dir/profile`."""
    resume_from_checkpoint: Changeable[Literal["auto"] | Path] = "auto"
    """`auto` goes on from the newest valid checkpoint of `output_dir`; a path names one."""
    allow_changes: Changeable[list[str]] = []
    """Names of what identifies a run and may differ from before when it goes on, such as seed, data, base_model."""

    stages: Changeable[list[dict[str, Any]]] = []
    """Each entry is the recipe with some fields overridden (and a `name`); they run in order."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("cache_vision_features", mode="before")
    @classmethod
    def _is_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads `off` as a truth value

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.cache_vision_features != "off" and "vision_tower" in TRAIN_TYPES[self.train_type].parts:
            raise ValueError(
                f"cache_vision_features: the vision tower learns under train_type {self.train_type}, so what it makes "
                "of an image changes with every step. Give cache_vision_features off, or another train_type"
            )
        evaluates = [
            name
            for name in ("eval_steps", "eval_generate_samples", "load_best_model_at_end", "early_stopping_patience")
            if name in self.model_fields_set and getattr(self, name)
        ]
        if evaluates and not (self.eval_data_path or self.eval_data or self.validation_split):
            raise ValueError(f"{evaluates[0]} needs held-out data: give eval_data_path, eval_data or validation_split")
        if evaluates and evaluates[-1] in ("load_best_model_at_end", "early_stopping_patience") and not self.eval_steps:
            raise ValueError(f"{evaluates[-1]} needs more than one evaluation: give eval_steps")
        if "multiple_choice_likelihood" in self.eval_metrics:
            raise ValueError("eval_metrics: multiple_choice_likelihood is measured by `evaluate` alone")
        best = self.metric_for_best_model.removeprefix("eval_")
        metrics = self.eval_metrics if self.eval_generate_samples else []
        measured = {value for name in metrics for value in VALUES_OF_METRICS.get(name, (name,))}
        if best != "loss" and best not in measured:
            raise ValueError(
                f"metric_for_best_model: `{self.metric_for_best_model}` is not measured. Give eval_loss, or a metric "
                f"that eval_metrics name ({', '.join(sorted(measured - {'auto', 'none'})) or 'none so far'}), with "
                "eval_generate_samples"
            )
        if self.warmup_steps is not None and "warmup_ratio" in self.model_fields_set:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        if self.prompt_style == "plain" and self.system_prompt:
            raise ValueError("system_prompt has no place in prompt_style plain: drop it, or use prompt_style chat")
        return self


class CompareConfig(TrainConfig):
    """Train in several ways under one budget, each with several seeds, and say what differs. Takes a recipe."""

    stage: str | None = None
    """Which stage of a recipe with `stages` (default: the first)."""
    variants: dict[str, dict[str, Any]] | None = None
    """What is compared, by name: the recipe with some fields overridden. Default: the train types whose weights fit."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    """Each variant is trained once with each; from two on, differences can be told from chance."""
    budget_samples: PositiveInt | None = None
    """Samples that each run trains on. One of the three budgets is given; the recipe's own length has no place."""
    budget_minutes: Annotated[float, Field(gt=0, le=_WEEK_S / 60)] | None = None
    """Minutes of training for each run: a rehearsal measures a variant's step, which fixes its number of steps."""
    budget_flops: Annotated[float, Field(gt=0)] | None = None
    """Model FLOPs that each run spends, such as 1e15."""
    max_eval_samples: PositiveInt | None = None
    """Use only the first so many held-out records."""
    metrics: list[MetricName] = ["auto"]
    """What is measured of generated answers, as in `evaluate`; the first one that suits also while a run goes on, of
    `eval_generate_samples` records."""
    max_new_tokens: PositiveInt = 32
    """Longest answer that is generated."""
    # Options of `train` whose defaults are others here.
    eval_steps: Changeable[NonNegativeInt] = 0
    """Held-out loss every so many steps (0: about ten times a run)."""
    eval_generate_samples: Changeable[NonNegativeInt] = 32
    """With the held-out loss, answer so many held-out samples, the same each time, where a metric suits them."""
    save_total_limit: Changeable[PositiveInt] = 1
    """Newest checkpoints kept of each run."""

    @field_validator("variants")
    @classmethod
    def _are_folders(cls, variants: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for name, overrides in (variants or {}).items():
            if not _VARIANT_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r:.100} names a folder: letters, digits, `-`, `_` and `.`, beginning with a letter or digit"
                )
            if taken := sorted(overrides.keys() & OF_COMPARISON.keys()):
                raise ValueError(f"{name}: `{taken[0]}` is the same for all, {OF_COMPARISON[taken[0]]}")
        if variants is not None and len({name.lower() for name in variants}) < max(2, len(variants)):
            raise ValueError("give at least two, whose names differ not only in case")
        return variants

    @model_validator(mode="after")
    def _check_comparison(self) -> "CompareConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each is trained once, found {self.seeds}")
        budgets = [name for name in type(self).model_fields if name.startswith("budget_") and getattr(self, name)]
        if len(budgets) != 1:
            raise ValueError(
                "give one of budget_samples, budget_minutes and budget_flops, which each run gets"
                + (f"; found {' and '.join(budgets)}" if budgets else "")
            )
        if not self.eval_entries and not self.validation_split:
            raise ValueError(
                "compare measures all runs on the same records, which none of them sees: give validation_split, "
                "eval_data_path or eval_data"
            )
        if self.max_eval_samples is not None and len(self.eval_entries) != 1:
            raise ValueError(
                "max_eval_samples bounds one held-out data set: beside validation_split, say there how many are held "
                "out; beside several data sets, give each its max_samples"
            )
        if self.stages:
            raise ValueError("compare trains one stage: name it with `stage`")
        return self


class EvaluateConfig(SampleOptions):
    """Held-out loss of a model on a data set, and metrics of its answers."""

    model_name_or_path: str
    """A model folder, a run's `final`, or a checkpoint-N."""
    base_model: Path | None = None
    """Folder of the model that the run started from, when it is no longer where it was."""
    data_path: Path | None = None
    """Same layouts as in `train`."""
    held_out: bool = False
    """Measure on what the run held out while it trained (its `validation_split`, `eval_data_path` or `eval_data`),
    prepared as there, instead of `data_path`."""
    lmms: list[str] = []
    """Tasks of lmms-eval, which runs them on its own, beside `data_path` or alone: `pope`, `gqa`, ..."""
    lmms_python: Path | None = None
    """The Python that has lmms-eval, when it is in an environment of its own."""
    lmms_include_path: Path | None = None
    """A folder with your own tasks of lmms-eval."""
    output_dir: Path | None = None
    """Where `samples.jsonl`, `summary.json`, `report.html` and what lmms-eval leaves go."""
    max_samples: PositiveInt | None = None
    """Use only the first so many records."""
    max_new_tokens: PositiveInt = 32
    """Longest answer that is generated."""
    per_device_eval_batch_size: PositiveInt = 16
    """Samples per batch."""
    blank_image: bool = False
    """Replace each image by a grey one: what remains is what the model guesses without looking."""
    metrics: list[MetricName] = ["auto"]
    """What is measured of generated answers; `auto` takes what suits all reference answers: `exact_match` when they are
    short (three words or fewer), `vqa` when each sample has ten of them, `yes_no`, `multiple_choice` (by letter).
    `multiple_choice_likelihood` is for options in the question, `anls` for texts read from documents, `cider` and
    `bleu` for captions."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16; `auto` where the hardware is fast at it."""
    dataloader_num_workers: NonNegativeInt = 2
    """Processes that decode images, where there are so many that it pays."""

    @field_validator("lmms", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        return [name for text in texts for name in str(text).split(",") if name] if isinstance(texts, list) else texts

    @model_validator(mode="after")
    def _measures_something(self) -> "EvaluateConfig":
        if self.data_path is None and not self.held_out and not self.lmms:
            raise ValueError(
                "give data_path (samples to measure on), or held_out (those that the run held out), or lmms (tasks of "
                "lmms-eval)"
            )
        if self.held_out and (given := sorted(OF_HELD_OUT & self.model_fields_set)):
            raise ValueError(f"held_out takes the run's own data, prepared as there: leave {given[0]} out")
        if self.lmms and self.output_dir is None:
            raise ValueError("lmms needs output_dir, for what lmms-eval leaves")
        return self


class ChatConfig(Schema):
    """Ask a model about an image."""

    model_name_or_path: str
    """A model folder, a run's `final`, or a checkpoint-N."""
    base_model: Path | None = None
    """Folder of the model that the run started from, when it is no longer where it was."""
    image: Path | None = None
    """An image file to talk about."""
    prompt: str | None = None
    """One question; without it a session is opened."""
    system_prompt: str | None = None
    """System message of the conversation."""
    max_new_tokens: PositiveInt = 256
    """Longest answer."""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token; above 0 samples."""
    seed: Seed = 0
    """Seed of the sampling."""


class DemoConfig(Schema):
    """Ask a model, or two side by side, about images on a page in the browser."""

    model_name_or_path: str
    """A model folder, a run's `final`, or a checkpoint-N."""
    base_model: Path | None = None
    """Folder of the model that the run started from, when it is no longer where it was."""
    compare_with: str | None = None
    """Another model, which answers the same questions beside the first."""
    compare_base_model: Path | None = None
    """What `base_model` is, for `compare_with`."""
    eval_data_path: Path | None = None
    """Held-out data for a gallery of samples, same layouts as in `train`."""
    image_folder: Path | None = None
    """Folder, .zip or .tar of its images; found beside it when not given."""
    num_samples: Annotated[int, Field(gt=0, le=100)] = 12
    """Number of samples in the gallery: the first ones with one image, each image once."""
    system_prompt: str | None = None
    """System message of every conversation."""
    max_new_tokens: PositiveInt = 256
    """Longest answer."""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token; above 0 samples."""
    seed: Seed = 0
    """Seed of the sampling."""
    host: str = "127.0.0.1"
    """Address to serve at: 127.0.0.1 is this machine alone, 0.0.0.0 its whole network, without a password."""
    port: Annotated[int, Field(gt=0, le=65_535)] = 7860
    """Port to serve at."""
    max_upload_mb: Annotated[int, Field(gt=0, le=1000)] = 20
    """Largest image file that the page takes, in megabytes."""

    @model_validator(mode="after")
    def _check(self) -> "DemoConfig":
        if self.image_folder is not None and self.eval_data_path is None:
            raise ValueError("image_folder belongs to eval_data_path: give both, or leave it out")
        if self.compare_base_model is not None and self.compare_with is None:
            raise ValueError("compare_base_model belongs to compare_with: give both, or leave it out")
        return self


class ExportConfig(Schema):
    """Turn a checkpoint or a finished run into a folder for plain transformers or llama.cpp, and verify it."""

    checkpoint: Path
    """A run's `checkpoint-N` or `final`."""
    output_dir: Path
    """Where the exported model is written."""
    base_model: Path | None = None
    """Folder of the model that the run started from, when it is no longer where it was."""
    overwrite: bool = False
    """Replace a non-empty output folder (with `push_to_hub` also the files that the repository has)."""
    format: Literal["transformers", "gguf"] = "transformers"
    """`gguf`: `model.gguf` and `mmproj.gguf` for llama.cpp, and a Modelfile for Ollama; needs
    `pip install 'llavaforge[gguf]'`."""
    gguf_type: Literal["auto", "f32", "f16", "bf16"] = "auto"
    """Type of the matrices in GGUF files; `auto`: the model's own, so that nothing is rounded."""
    push_to_hub: str | None = None
    """OWNER/NAME of a repository of the Hugging Face hub, to which the verified folder is uploaded."""
    private: bool = False
    """Make that repository private."""

    @model_validator(mode="after")
    def _check(self) -> "ExportConfig":
        if self.gguf_type != "auto" and self.format != "gguf":
            raise ValueError("gguf_type belongs to format gguf: give that too, or leave gguf_type out")
        if self.private and self.push_to_hub is None:
            raise ValueError("private is about a repository of the hub: give push_to_hub too, or leave it out")
        return self


class SlurmConfig(Schema):
    """Write an sbatch script that trains a recipe. What SLURM has and is not here is given to sbatch itself."""

    recipe: Path
    """The YAML recipe to train."""
    nodes: PositiveInt = 1
    """Number of nodes."""
    gpus_per_node: PositiveInt = 4
    """GPUs of each node, and processes on it."""
    cpus_per_gpu: PositiveInt = 12
    """Processor cores of each process; its loader workers run on them too."""
    mem: str | None = None
    """Memory of each node, such as 480G (0: all of it; default: the cluster's)."""
    time: str | None = None
    """Time limit of one start, as SLURM writes it: 24:00:00, 2-12 (default: the partition's); then the run goes on."""
    partition: str | None = None
    """Partition to run in."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    job_name: str = "llavaforge"
    """Name of the job, and of its log: `<job_name>-<job number>.log`."""
    deepspeed: str | None = None
    """As in `train`; overrides the recipe's."""
    output: Path | None = None
    """The script to write (default: the recipe's name with .sh, in the current folder)."""
    overwrite: bool = False
    """Replace the script if it is there."""


class EstimateConfig(EngineOptions, LearningOptions, BatchOptions):
    """Parameters, memory per GPU, time and cost of a training, from configs alone, in about a second.

    Takes a training recipe too.
    """

    model_name_or_path: str | None = None
    """A LLaVA's folder or hub name, or the two parts:"""
    vision_tower: str | None = None
    """Folder or hub name of a CLIP or SigLIP, as in `customize-model`; of the hub only small files are downloaded."""
    language_model: str | None = None
    """Folder or hub name of a causal language model, as in `customize-model`."""
    stage: str | None = None
    """Which stage of a recipe with `stages` (default: the first)."""

    gpu: str | None = None
    """Which card: `a100-80gb`, `h200`, `rtx 4090`, or its full name (default: that of `env`)."""
    num_gpus: PositiveInt = 1
    """How many of them train together."""
    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of each in 10^9 bytes (default: the data sheet's, or what `env` saw)."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense TFLOP/s of each (default: the data sheet's in bfloat16, or what `env` measured)."""
    mfu: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the peak that training reaches (default: what `env` measured for each train type, or 0.4)."""
    env: Path | None = None
    """What `llavaforge env --check --output FILE` wrote on such a machine: its card, memory and measured MFU."""
    price_per_gpu_hour: NonNegativeFloat | None = None
    """What an hour of one card costs, in any currency."""

    num_samples: PositiveInt = 595_375
    """Samples of an epoch (default: those of LLaVA-CC3M-Pretrain-595K)."""
    images_per_sample: NonNegativeFloat = 1.0
    """Images of a sample, on average."""
    text_tokens: PositiveInt = 64
    """Tokens of a sample beside its images."""
    supervised_tokens: PositiveInt | None = None
    """How many of them are supervised (default: half)."""
    data_index: Path | None = None
    """A prepared data set, `index/*.arrow` in the cache: number and sizes of its samples, instead of the four above."""

    @model_validator(mode="after")
    def _check(self) -> "EstimateConfig":
        parts = (self.vision_tower, self.language_model)
        if self.model_name_or_path is None and None in parts:
            raise ValueError("no model: give model_name_or_path, or vision_tower and language_model")
        if any(parts) and None in parts:
            raise ValueError("vision_tower and language_model belong together: give both, or model_name_or_path")
        if self.supervised_tokens is not None and self.supervised_tokens > self.text_tokens:
            raise ValueError(f"supervised_tokens = {self.supervised_tokens}: at most text_tokens, {self.text_tokens}")
        return self


class EnvConfig(Schema):
    """Show this machine as a report of a fault needs it; prove that it trains rightly, and how fast."""

    check: bool = False
    """Also check it, in about two minutes: attention, a step of each train type, ZeRO, resume, rates, real shapes."""
    output: Path | None = None
    """A JSON file for all of it."""


class QuickstartConfig(Schema):
    """The whole story on tiny parts: join, train twice, evaluate, export, answer."""

    output_dir: Path = Path("quickstart")
    """Where everything is written."""
    seed: Seed = 0
    """Seed of the data, the projector and the sample order."""
