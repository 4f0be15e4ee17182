#!/usr/bin/env bash
# Train under SLURM, one task per GPU; after a time limit, a preemption or a dead node the run goes on by itself.
#
#   sbatch run.sh recipe.yaml [--field value ...]
#   sbatch --nodes=2 --time=24:00:00 --partition=gpu run.sh ...     options of sbatch override the lines below
#   DEEPSPEED=zero3 sbatch run.sh ...                               and so do these variables:
#
#   VENV          virtual environment to activate (default: .venv where the job is submitted, if there is one)
#   LLAVAFORGE    the program (default: llavaforge)
#   DEEPSPEED     zero1, zero2, zero3, zero2-offload, zero3-offload, or a JSON file (default: the recipe's, else zero2)
#   MAX_REQUEUES  after so many, a start that ends within ten minutes is the last (default: 20)
#   SLURM_WAIT    seconds that srun waits for the other tasks when one has ended (default: 600)
#SBATCH --job-name=llavaforge
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=USR1@120
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
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

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
