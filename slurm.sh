#!/usr/bin/env bash
# Training on several hosts under Slurm: sbatch slurm.sh [train.py's flags].
# One torchrun a host starts one process a GPU. The processes meet at the first host.
# The output folder must be one that all hosts see.
#SBATCH --job-name=dino
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# SIGTERM comes two minutes before the time is over: the run saves and stops, and the same sbatch
# continues it. Slurm does that by itself only after a host's failure or a preemption (--requeue).
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Each restart of the processes needs a new store: the old one still has the lost ones' addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # torchrun's own is 30 seconds: a large save takes longer
port=$((20000 + SLURM_JOB_ID % 20000))     # two jobs on one host need two
# srun takes the CPUs of a task from its own flag alone, since Slurm 22.05
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:$port" --rdzv_id="$SLURM_JOB_ID" train.py "$@"
