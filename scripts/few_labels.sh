#!/usr/bin/env bash
# Table 4's rows at few labels: rows x seeds of short finetunings on a share of the demonstrations -> outputs/few_labels/table.md
# FRACTION=0.05 SEEDS="0 1 2 3 4" STEPS=1200 scripts/few_labels.sh scale=tiny     STEPS include those of the alignment, 600 at tiny
source "$(dirname "$0")/common.sh"
out=outputs/few_labels
rows="${ROWS:-pretrained t4_gidm_no_pretrain t4_gfdm_no_pretrain}"
for seed in ${SEEDS:-0 1 2 3 4}; do
    for row in $rows; do
        experiment="$([ "$row" = pretrained ] && echo null || echo "defi/$row")"  # the paper's policy is no row of its own
        name="few/$row/$seed"
        [ -f "${DEFI_CKPTS:-ckpts}/defi/$name/meta.json" ] || python -m step3_defi.train "experiment=$experiment" "name=$name" "seed=$seed" \
            "data.fraction=${FRACTION:-0.05}" "loop.max_steps=${STEPS:-1200}" loop.save_every=100000 "$@"
    done
done
python -m step3_defi.seeds "runs=${DEFI_CKPTS:-ckpts}/defi/few" base=pretrained "out=$out"
