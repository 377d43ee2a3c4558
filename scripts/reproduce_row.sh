#!/usr/bin/env bash
# Reproduce a row of a table: every step that has a file of that name, then the rollout.   e.g. t8_binning [scale=tiny ...]
source "$(dirname "$0")/common.sh"
row="$1"; shift
test -n "$(ls configs/experiment/*/"$row".yaml 2>/dev/null)" || { echo "no row $row; rows: $(ls configs/experiment/*/ | grep yaml | sort -u | tr '\n' ' ')" >&2; exit 1; }
run() { test ! -f "configs/experiment/$2/$row.yaml" || "scripts/$1" "experiment=$2/$row" "${@:3}"; }
run step1_train_svd.sh gfdm "$@" && run step2_train_gidm.sh gidm "$@" && run step3_train_calvin.sh defi "$@"
test ! -d "ckpts/defi/$row" || scripts/step3_rollout_calvin.sh "policy=ckpts/defi/$row" "out=outputs/$row" ${ROLLOUT:-}
