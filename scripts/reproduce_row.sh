#!/usr/bin/env bash
# Reproduce a row of a table or figure: train the models that it needs and that do not exist yet, then train the row
# itself, then roll its policy out.
#
#   scripts/reproduce_row.sh                          prints the names of the rows (configs/rows.yaml)
#   scripts/reproduce_row.sh t8_binning scale=tiny    all further arguments go to every training
#   scripts/reproduce_row.sh gfdm/t6_dino             trains this model alone, of all rows with the name t6_dino
#   ROLLOUT="scene=D sequences=100" scripts/reproduce_row.sh t1_third_view      keys of step3_defi.eval
source "$(dirname "$0")/common.sh"

rows="$(python -m common.rows)"
if [ $# -eq 0 ]; then
    echo "$rows"
    exit
fi
row="$1"
shift
scale=full
for word in "$@"; do
    case "$word" in
        scale=*) scale="${word#scale=}" ;;
    esac
done

# The models of the row. Without a step in its name, it is the policy, or where there is none, the models of this name.
case "$row" in
    */*) models="$(grep -Fx -- "$row" <<< "$rows" || true)" ;;
    *) models="$(grep -Fx -e "defi/$row" <<< "$rows" || grep -Fx -e "gfdm/$row" -e "gidm/$row" <<< "$rows" || true)" ;;
esac
if [ -z "$models" ]; then
    echo "There is no row $row. The rows are:" $rows >&2
    exit 1
fi

# A policy needs the forward and the inverse model whose folders its config names.
policy=""
if [[ "$models" == defi/* ]]; then
    policy="$models"
    config="$(python -m step3_defi.train experiment="$policy" "$@" --cfg job --resolve --package policy)"
    models="$(sed -nE 's#^ *path: .*/((gfdm|gidm)/[^/]+)$#\1#p' <<< "$config") $policy"
fi

# This ends the script where a model exists and is of another scale.
missing="$(python -m common.missing scale="$scale" models="[$(echo $models | tr ' ' ',')]")"

for model in $missing; do
    name="${model#*/}"
    case "$model" in
        gfdm/*) launcher=scripts/step1_train_svd.sh ;;
        gidm/*) launcher=scripts/step2_train_gidm.sh ;;
        defi/*) launcher=scripts/step3_train_calvin.sh ;;
    esac
    banner "Train $model"
    if grep -qFx -- "$model" <<< "$rows"; then
        "$launcher" experiment="$model" name="$name" "$@"
    else
        "$launcher" name="$name" "$@"  # the model of the scale, without a row
    fi
done

if [ -n "$policy" ]; then
    banner "Roll $policy out"
    scripts/step3_rollout_calvin.sh rollout="$scale" policy="${DEFI_CKPTS:-ckpts}/$policy" \
        out="outputs/${policy#defi/}" ${ROLLOUT:-}
fi
