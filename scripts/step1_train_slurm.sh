#!/usr/bin/env bash
#SBATCH --job-name=gfdm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --signal=TERM@120
# Pretrain the forward model over several nodes of eight GPUs: an example for Slurm, to be adapted to the cluster.
#
#   sbatch --nodes=4 scripts/step1_train_slurm.sh scale=full
set -euo pipefail
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export head
export MACHINE=multinode
srun bash -c '
    ACCELERATE_FLAGS="--num_machines $SLURM_NNODES --num_processes $((8 * SLURM_NNODES))"
    ACCELERATE_FLAGS="$ACCELERATE_FLAGS --machine_rank $SLURM_NODEID --main_process_ip $head"
    export ACCELERATE_FLAGS
    exec scripts/step1_train_svd.sh "$@"
' _ "$@"
