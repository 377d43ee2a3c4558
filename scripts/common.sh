# Every script sources this file. It goes to the root of the repository, activates .venv where there is one, and defines
# two functions: `launch` starts a program with accelerate, `banner` titles a step of a longer script and times it.
#
# Variables of the environment:
#   MACHINE=cpu|1gpu|8gpu|8gpu_fsdp|multinode   the file of configs/accelerate; by default it follows the visible GPUs
#   ACCELERATE_FLAGS="..."                      more flags for `accelerate launch`
#   CUDA_VISIBLE_DEVICES=2,5                    the GPUs to use
#   DEFI_CKPTS, DEFI_DATA                       other folders than ckpts and data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Count the GPUs that this process may use.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -cE '^([0-9]|GPU|MIG)' || true)
else
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
if [ -z "${MACHINE:-}" ]; then
    case "$gpus" in
        0) MACHINE=cpu ;;
        1) MACHINE=1gpu ;;
        *) MACHINE=8gpu ;;
    esac
fi

launch() {  # launch <module> [key=value ...]
    local processes=""
    case "$MACHINE" in
        8gpu*) processes="--num_processes $gpus" ;;
    esac
    exec accelerate launch --config_file "configs/accelerate/$MACHINE.yaml" $processes ${ACCELERATE_FLAGS:-} -m "$@"
}

banner() {  # banner <title>: ends the step before, and says how long it took
    if [ -n "${step_title:-}" ]; then
        local seconds=$((SECONDS - step_start))
        echo "---- took $((seconds / 60)) min $((seconds % 60)) s: $step_title"
    fi
    step_title="$1"
    step_start=$SECONDS
    printf '\n==== %s\n' "$1"
}
