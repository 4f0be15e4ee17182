"""`llavaforge slurm`: write the sbatch script that trains a recipe on GPUs of several nodes, and goes on by itself.

Comes in: a recipe, and what SLURM is to be asked for. Goes out: a script. `run.sh` of the repository is `script` of the
defaults without a recipe.
"""

import logging
import re
import shlex
from pathlib import Path

from llavaforge.config.load import build, read_recipe
from llavaforge.config.recipe import override_all, stage_values
from llavaforge.config.schema import SlurmConfig, TrainConfig
from llavaforge.errors import UserError
from llavaforge.files import check_own, replace_text
from llavaforge.results import SlurmResult

logger = logging.getLogger(__name__)

_MIN_MINUTES = 5  # 120 s before the limit the run is told to save, and SLURM may be 60 s early
_NAMES = ("partition", "account", "qos", "constraint", "job_name")

_OWN = "#!/usr/bin/env bash\n# Train under SLURM, one task per GPU"  # how a script begins that may be replaced
_SCRIPT = r"""#!/usr/bin/env bash
# Train under SLURM, one task per GPU; after a time limit, a preemption or a dead node the run goes on by itself.
#
#   sbatch @NAME@ @ARGUMENTS@
#   sbatch --nodes=2 --time=24:00:00 --partition=gpu @NAME@ ...     options of sbatch override the lines below
#   DEEPSPEED=zero3 sbatch @NAME@ ...                               and so do these variables:
#
#   VENV          virtual environment to activate (default: .venv where the job is submitted, if there is one)
#   LLAVAFORGE    the program (default: llavaforge)
#   DEEPSPEED     zero1, zero2, zero3, zero2-offload, zero3-offload, or a JSON file (default: @DEFAULT_DEEPSPEED@)
#   MAX_REQUEUES  after so many, a start that ends within ten minutes is the last (default: 20)
#   SLURM_WAIT    seconds that srun waits for the other tasks when one has ended (default: 600)
@DIRECTIVES@
# USR1 goes to the tasks, not to this shell, 120 to 180 s before the time limit: they save a checkpoint and exit 75.
# To stop for good: scancel JOBID. The tasks get SIGTERM, save, and have KillWait seconds for it (scontrol show config).
# Where that is too short: scontrol update JobId=JOBID Requeue=0, then scancel --signal=USR1 JOBID.
set -uo pipefail
: "${SLURM_JOB_ID:?submit this script with sbatch}"
if [ -n "${VENV:-}" ] || [ -e .venv/bin/activate ]; then
    source "${VENV:-.venv}/bin/activate" || exit 2
fi
LLAVAFORGE=${LLAVAFORGE:-llavaforge}
command -v "$LLAVAFORGE" >/dev/null || { echo "error: no program $LLAVAFORGE: set VENV or LLAVAFORGE." >&2; exit 2; }
@SETTINGS@export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# When SLURM ends the job (scancel, preemption, the limit itself) this shell gets SIGTERM too: let the tasks save first.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM

# --kill-on-bad-exit=0: a task that has saved and exits 75 must not kill those that still save.
# --wait: longer than SlurmdTimeout (300 s), so that the job still runs, and is requeued, when SLURM finds a node dead.
# --cpus-per-task: since SLURM 22.05 srun does not take it from the job; --export: nor PATH after sbatch --export=NONE.
srun --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-600}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL \
    "$LLAVAFORGE" train ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} "$@"
code=$?  # the highest of the tasks' exit codes
if [ "$code" -ne 75 ]; then
    exit "$code"
elif [ -n "$ended_by_slurm" ]; then
    echo "saved; SLURM ended this job, so whether it is queued again is SLURM's to say" >&2
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-20}" ] && [ "$SECONDS" -lt 600 ]; then
    echo "saved, but not queued again: that was done MAX_REQUEUES times, and this start took only $SECONDS s" >&2
else
    # SLURM holds a requeued job for two minutes (BeginTime); scontrol update JobId=... StartTime=now ends that.
    echo "saved after $SECONDS s; SLURM is asked to queue this job again" >&2
    scontrol requeue "$SLURM_JOB_ID" || echo "SLURM does not queue this job again: submit it once more" >&2
fi
exit 75
"""


def slurm(config: SlurmConfig) -> SlurmResult:
    """Write the sbatch script of a recipe.

    Returns:
        output (the script), submit (the command), processes (how many train together).

    Raises:
        UserError: the recipe or an option is at fault, the recipe does not fit the number of GPUs, or the script is
            there already.
    """
    _check_options(config)
    _check_recipe(config)
    output = config.output or Path(f"{config.recipe.stem}.sh")
    if output.is_dir() or not output.name.isprintable():
        raise UserError(f"{str(output)!r}: not a file's name. Give the name of a script as --output.")
    if output.exists() and not config.overwrite:
        raise UserError(f"{output}: is there already. Give another --output, or --overwrite to replace it.")
    check_own(output, _OWN)
    replace_text(output, script(config, output.name, config.recipe), _OWN)
    output.chmod(0o755)
    submit = f"sbatch {shlex.quote(str(output))}"
    logger.info(
        "%s: %s on %d x %d GPUs. Submit it from this folder:\n\n    %s\n\nFurther options of sbatch go before the "
        "script's name, fields of the recipe after it:\n\n    sbatch --mail-type=END %s --learning_rate 1e-5\n",
        output, config.recipe, config.nodes, config.gpus_per_node, submit, shlex.quote(str(output)),
    )  # fmt: skip
    return {"output": str(output), "submit": submit, "processes": config.nodes * config.gpus_per_node}


def script(config: SlurmConfig, name: str, recipe: Path | None) -> str:
    """Return the text of a script.

    Args:
        config: what SLURM is asked for; the recipe in it is not read.
        name: what the script is called in its comments.
        recipe: the recipe that it trains; without one, the script's first argument.
    """
    settings = f'set -- {shlex.quote(str(recipe))} "$@"\n' if recipe else ""
    if config.deepspeed:
        settings += f"DEEPSPEED=${{DEEPSPEED:-{config.deepspeed}}}\n"
    values = {
        "NAME": shlex.quote(name),
        "ARGUMENTS": "[--field value ...]" if recipe else "recipe.yaml [--field value ...]",
        "DEFAULT_DEEPSPEED": config.deepspeed or "the recipe's, else zero2",
        "DIRECTIVES": "\n".join(f"#SBATCH --{option}" for option in _directives(config)),
        "SETTINGS": settings,
    }
    return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], _SCRIPT)


def _directives(config: SlurmConfig) -> list[str]:
    """Return the options of sbatch that the script carries."""
    asked = {name: getattr(config, name) for name in ("time", "partition", "account", "qos", "constraint", "mem")}
    return [
        f"job-name={config.job_name}",
        "output=%x-%j.log",
        "open-mode=append",  # a requeued job has the same number: keep what it said before
        f"nodes={config.nodes}",
        f"ntasks-per-node={config.gpus_per_node}",
        f"gres=gpu:{config.gpus_per_node}",
        f"cpus-per-task={config.cpus_per_gpu}",
        *(f"{option}={value}" for option, value in asked.items() if value is not None),
        "requeue",
        "signal=USR1@120",
    ]


def _check_options(config: SlurmConfig) -> None:
    """Refuse what sbatch would misread: it would say so only at submission, or not at all."""
    for field in _NAMES:
        value = getattr(config, field)
        if value is not None and not re.fullmatch(r"[^\s\"'\\#]+", value):
            raise UserError(f"`{field}` = {value!r}: give a name without spaces, quotes, backslashes and `#`.")
    if config.mem is not None and not re.fullmatch(r"\d+[KMGT]?", config.mem):
        raise UserError(f"`mem` = {config.mem!r}: give the memory of a node such as 480G (0: all of it).")
    if config.deepspeed is not None and not re.fullmatch(r"[\w./+-]+", config.deepspeed):
        raise UserError(f"`deepspeed` = {config.deepspeed!r}: give zero1, zero2, zero3, or a path of plain characters.")
    if config.time is not None and _minutes(config.time) < _MIN_MINUTES:
        raise UserError(
            f"`time` = {config.time!r} is less than {_MIN_MINUTES} minutes: the run is told to save up to 3 minutes "
            "before the limit, so it would get nowhere. A bare number is minutes; give hours as 24:00:00."
        )


def _minutes(time: str) -> float:
    """Return a time limit in minutes, written in any of SLURM's ways."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?", time)
    if found is None:
        raise UserError(
            f"`time` = {time!r}: give HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, MM:SS or minutes, such as 24:00:00 or 2-12. "
            "Without --time the partition's own limit holds."
        )
    days, first, second, third = (int(group or 0) for group in found.groups())
    if found[1] is not None or found[4] is not None:  # D-HH... or HH:MM:SS
        return days * 1440 + first * 60 + second + third / 60
    return first + second / 60


def _check_recipe(config: SlurmConfig) -> None:
    """Check each stage of the recipe as `train` will, before a job waits in a queue for it."""
    flags = {"deepspeed": config.deepspeed} if config.deepspeed else {}
    processes = config.nodes * config.gpus_per_node
    stages = stage_values(override_all(read_recipe(config.recipe), flags), str(config.recipe))
    for number, (name, values) in enumerate(stages):
        where = f"{config.recipe}: stages[{number}] ({name})" if name else str(config.recipe)
        batch = build(TrainConfig, values, where).global_batch_size
        if batch is not None and batch % processes:
            below = batch // processes * processes
            fitting = [str(size) for size in (below, below + processes) if size]
            raise UserError(
                f"{where}: global_batch_size {batch} does not divide over {config.nodes} x {config.gpus_per_node} = "
                f"{processes} GPUs. Set it to {' or '.join(fitting)}, or take other --nodes and --gpus_per_node."
            )
