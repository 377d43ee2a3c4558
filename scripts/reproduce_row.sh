#!/usr/bin/env bash
# Reproduce a row of a table: what it stands on and is not there yet, the row itself, its rollout (ROLLOUT="scene=D ..." adds to it).   e.g. t8_binning scale=tiny
source "$(dirname "$0")/common.sh"
row="$1" ckpts="${DEFI_CKPTS:-ckpts}" scale=full; shift
for word in "$@"; do case "$word" in scale=*) scale="${word#scale=}" ;; esac; done
models="$(cd configs/experiment && find gfdm gidm -name "$row.yaml" | sed 's/.yaml$//')"
if [ -f "configs/experiment/defi/$row.yaml" ]; then  # the artifacts that its policy is built from, then the policy
    models="$(python -m step3_defi.train "experiment=defi/$row" "$@" --cfg job --resolve -p policy | sed -nE 's#^ *path: .*/((gfdm|gidm)/[^/]+)$#\1#p') defi/$row"
elif [ -z "$models" ]; then echo "no row $row; rows: $(ls configs/experiment/*/ | grep yaml | sort -u | tr '\n' ' ')" >&2; exit 1; fi
missing="$(python -m common.missing "scale=$scale" "models=[$(echo $models | tr ' ' ',')]")"  # ends here where one of another scale is in the way
for model in $missing; do
    case "$model" in gfdm/*) script=step1_train_svd ;; gidm/*) script=step2_train_gidm ;; *) script=step3_train_calvin ;; esac
    if [ -f "configs/experiment/$model.yaml" ]; then words="experiment=$model"; else words=""; fi
    "scripts/$script.sh" $words "name=${model#*/}" "$@"
done
[ ! -d "$ckpts/defi/$row" ] || scripts/step3_rollout_calvin.sh "rollout=$scale" "policy=$ckpts/defi/$row" "out=outputs/$row" ${ROLLOUT:-}
