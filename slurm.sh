#!/usr/bin/env bash
# Training on several hosts under Slurm: sbatch slurm.sh [train.py's flags]. One torchrun a host, which starts one
# process a GPU; the first host is the meeting point. The output folder must be one that all hosts see.
#SBATCH --job-name=dino
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# SIGTERM comes two minutes before the time is over: the run saves and stops, and the same sbatch goes on there. Only
# after a host's failure or a preemption does Slurm do that by itself (--requeue).
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# each restart of the processes begins with a store of its own: an old one would still tell where the lost ones listened
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID" train.py "$@"
