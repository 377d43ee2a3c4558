#!/usr/bin/env bash
#SBATCH --job-name=gfdm --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=48:00:00 --signal=TERM@120
# Step 1 over several nodes of eight GPUs, an example.   sbatch --nodes=4 scripts/step1_train_slurm.sh [Hydra overrides]
set -euo pipefail
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"; export head MACHINE=multinode
srun bash -c 'export ACCELERATE_FLAGS="--num_machines $SLURM_NNODES --num_processes $((8 * SLURM_NNODES)) --machine_rank $SLURM_NODEID --main_process_ip $head"
              exec scripts/step1_train_svd.sh "$@"' _ "$@"
