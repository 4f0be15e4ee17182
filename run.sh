#!/usr/bin/env bash
# Train under SLURM on four GPUs of one node with DeepSpeed ZeRO-2:   sbatch run.sh recipes/both-stages.yaml [--field value ...]
#SBATCH --job-name=llavaforge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=12
#SBATCH --signal=USR1@300
#SBATCH --requeue
# USR1 comes 300 s before the time limit: the run saves a checkpoint and exits 75, and the job is queued again.
set -uo pipefail
source .venv/bin/activate

# One task per GPU: srun is the launcher, and llavaforge reads rank and address from SLURM.
srun llavaforge train "$@" --deepspeed recipes/zero2.json
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
