"""What each verb returns: from a Python function as a dict, from the command line as the same keys in one JSON line."""

from typing import Any, TypedDict


class EnvResult(TypedDict):
    """Result of `env`: what the machine is, and what was checked."""

    llavaforge: str
    """Its version."""
    python: str
    """Its version."""
    system: str
    """Operating system, its release, the kind of processor."""
    libraries: dict[str, str | None]
    """Versions; None for what is not installed."""
    cpu: str
    """Name of the processor."""
    cores: int
    """Cores that this process may use."""
    cpu_capability: str
    """Widest vector instructions that torch uses."""
    memory_gib: float
    """Memory of the host."""
    shm_gib: float | None
    """Shared memory (`/dev/shm`), through which the loader workers hand over."""
    device: str
    """Where training runs: cuda, mps or cpu."""
    devices: list[dict[str, Any]]
    """Name, memory, capability and multiprocessors of each GPU."""
    driver: str | None
    """Version of NVIDIA's driver."""
    cuda: str | None
    """Version of CUDA that torch was built for."""
    hip: str | None
    """The same of ROCm."""
    nccl: str | None
    """Version of NCCL."""
    compute_dtype: str
    """What `--bf16 auto` chooses here."""
    attention: str
    """Which attention a packed step takes here."""
    compiles: str
    """Whether `--compile` works here, and if not, what it lacks."""
    environment: dict[str, str]
    """Variables that change how a run goes, where they are set."""
    checks: list[dict[str, Any]]
    """Name, ok, seconds, figures and failures of each check."""
    num_failed: int
    """Checks that failed."""


class QuickstartResult(TypedDict):
    """Result of `quickstart`."""

    exact_match: float
    """Share of the held-out questions that the trained model answers as the reference does."""
    exact_match_blank_image: float
    """The same with grey images: what it guesses without looking."""
    majority_share: float
    """The same of one who always gives the commonest answer."""
    wall_s: float
    """Seconds from begin to end."""
    model: str
    """Folder of the joined model, before training."""
    run: str
    """Folder of the training run."""
    exported: str
    """Folder of the trained model for plain transformers."""
    picture: str
    """An image file with questions and answers."""


class CustomizeModelResult(TypedDict):
    """Result of `customize_model`."""

    output_dir: str
    """Folder of the joined model."""
    image_token_id: int
    """Id of `<image>` in its tokenizer."""
    parameters: dict[str, int]
    """Number of parameters of `vision_tower`, `projector`, `language_model` and in `total`."""


class DataCheckResult(TypedDict):
    """Result of `check`."""

    num_records: int
    """Records looked at."""
    num_images: int
    """Images that they name."""
    num_errors: int
    """Faults that training would stop at."""
    num_warnings: int
    """Faults that it would not stop at."""
    errors_by_kind: dict[str, int]
    """Number of errors of each kind that was found."""
    warnings_by_kind: dict[str, int]
    """Number of warnings of each kind that was found."""
    steps_per_epoch: int | None
    """Optimizer steps of an epoch; None without a model, or where a data set has no sound record."""
    report: str | None
    """The HTML page, where one was asked for."""
    quarantine: str | None
    """The list of bad records, where one was asked for."""


class DataPreviewResult(TypedDict):
    """Result of `preview`."""

    output: str | None
    """The HTML page, where one was asked for."""
    num_samples: int
    """Samples shown."""


class ShapesSplit(TypedDict):
    """One split of a data set of coloured shapes."""

    num_images: int
    """Images, each with a caption."""
    num_questions: int
    """Questions about them."""
    majority_answer: str
    """The commonest answer."""
    majority_share: float
    """Share of the questions that it is right for."""


class MakeShapesResult(TypedDict):
    """Result of `make_shapes`."""

    output_dir: str
    """Folder of the data set."""
    seed: int
    """Seed of its scenes."""
    train: ShapesSplit
    """What is in `train/`."""
    heldout: ShapesSplit
    """What is in `heldout/`."""


class TrainResult(TypedDict):
    """Result of `train`; with `stages`, that of the last one. Counts are of the whole run, resumes included."""

    output_dir: str
    """Folder of the run."""
    global_step: int
    """Optimizer steps done."""
    train_loss: float
    """Mean loss per supervised token over the run."""
    eval_loss: float | None
    """Newest held-out loss per supervised token; None without held-out data."""
    best_metric: float | None
    """Best value of `metric_for_best_model`; None without held-out data."""
    best_step: int | None
    """The step where it was measured; with `load_best_model_at_end` the finished model is that step's."""
    stopped_early: bool
    """Whether `early_stopping_patience` ended the run before its last step."""
    samples_per_s: float
    """Samples per second, over all processes."""
    tokens_per_s: float
    """Tokens per second, image tokens included, over all processes."""
    mfu: float
    """Model FLOPs utilisation: the share of the hardware's peak FLOP/s that the model's own arithmetic makes up."""
    peak_memory_bytes: int
    """Most memory that this process held (the device's, or on a CPU the process's)."""
    num_bad_samples: int
    """Records and images left out (`on_bad_sample="skip"`)."""


class CompareResult(TypedDict):
    """Result of `compare`."""

    output_dir: str
    """Folder of the comparison."""
    report: str
    """The HTML page."""
    num_runs: int
    """Runs of all variants and seeds."""
    num_trained: int
    """How many of them this start has trained; the others were there."""
    best: str | None
    """The variant with the lowest mean held-out loss, by however little; None where no loss is finite."""
    variants: dict[str, dict[str, Any]]
    """By name: what learns, its steps, and the mean over seeds and the spread (standard deviation) of each measure."""
    differences: list[dict[str, Any]]
    """Each pair of variants in each measure: mean, 95 % interval, p, p among all comparisons, verdict."""


class EvaluateResult(TypedDict):
    """Result of `evaluate`."""

    num_samples: int
    """Samples measured."""
    loss: float | None
    """Mean loss per supervised token; None with `lmms` alone."""
    perplexity: float | None
    """e to the loss."""
    exact_match: float | None
    """Share of the answers that are the reference's; None where it was not measured."""
    lmms: dict[str, dict[str, float]]
    """lmms-eval's numbers, by task."""
    intervals: dict[str, list[float]]
    """95 % interval of the loss and of each metric (bootstrap over samples)."""
    model_name_or_path: str
    """The model measured."""
    data_path: str | None
    """The data it was measured on."""
    held_out: bool
    """Whether that is what the run held out, of this data."""
    blank_image: bool
    """Whether the images were replaced by grey ones."""


class ExportResult(TypedDict):
    """Result of `export`."""

    output_dir: str
    """Folder of the exported model."""
    max_logit_difference: float
    """Largest difference between its logits under plain transformers and those of the trained model."""
    max_embedding_difference: float | None
    """Largest difference between an image embedding of `mmproj.gguf` and plain transformers'; None without GGUF."""
    url: str | None
    """Address of the repository it was uploaded to."""


class SlurmResult(TypedDict):
    """Result of `slurm`."""

    output: str
    """The script."""
    submit: str
    """The command that submits it."""
    processes: int
    """Processes that train together."""


class EstimateRow(TypedDict):
    """What `estimate` says of one train type on one engine."""

    train_type: str
    """What learns."""
    engine: str
    """`plain` or the ZeRO stage, with or without offload."""
    learning: int
    """Number of parameters that learn."""
    memory_per_gpu: dict[str, int]
    """Bytes of weights, gradients, optimizer, buffers, activations and logits, and in `total` at the worst moment."""
    fits: bool
    """Whether that is within the usable share of the card's memory."""
    recompute_every: int
    """Every how many layers one is recomputed (0: none), as `gradient_checkpointing: auto` decides."""
    micro_batch: int
    """Samples of the micro-batch that this is for."""
    largest_micro_batch: int
    """Most samples that fit (`gradient_checkpointing: auto`: with every layer recomputed); 0: not even one."""
    mfu: float
    """Model FLOPs utilisation that the time goes by."""
    hours_per_epoch: float
    """Hours of an epoch on all GPUs together."""
    cost_per_epoch: float | None
    """Its price; None without `price_per_gpu_hour`."""


class EstimateResult(EstimateRow):
    """Result of `estimate`: the train type and engine that the options ask for, and all others in `rows`."""

    parameters: dict[str, int]
    """Number of parameters of `vision_tower`, `projector`, `language_model` and in `total`."""
    gpu: str
    """Name of the card."""
    num_gpus: int
    """How many of them."""
    assumptions: dict[str, Any]
    """What the figures hang on: samples, memory, peak rate, where the MFU comes from."""
    rows: list[EstimateRow]
    """Every train type on every engine."""
