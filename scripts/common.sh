# Sourced by every launcher: go to the root, use .venv where it stands, pick the machine (MACHINE=cpu|1gpu|8gpu|8gpu_fsdp|multinode).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -f .venv/bin/activate ] && source .venv/bin/activate
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -cE '^([0-9]|GPU|MIG)' || true)
else gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
case "$gpus" in 0) guess=cpu ;; 1) guess=1gpu ;; *) guess=8gpu ;; esac
MACHINE="${MACHINE:-$guess}"
case "$MACHINE" in 8gpu*) FLAGS="--num_processes $gpus" ;; *) FLAGS="" ;; esac
launch() { exec accelerate launch --config_file "configs/accelerate/$MACHINE.yaml" $FLAGS ${ACCELERATE_FLAGS:-} -m "$@"; }
