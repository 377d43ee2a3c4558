#!/usr/bin/env bash
# Table 4 with few labels: finetune every row with several seeds on a small share of the demonstrations, and compare the
# rows seed by seed -> outputs/few_labels/table.md
#
#   scripts/few_labels.sh scale=tiny
#   FRACTION=0.05 SEEDS="0 1 2 3 4" STEPS=1200 ROWS="pretrained t4_gidm_no_pretrain" scripts/few_labels.sh scale=tiny
#
# All arguments go to every training. A training that is finished is not repeated.
source "$(dirname "$0")/common.sh"

FRACTION="${FRACTION:-0.05}"    # share of the demonstrations
SEEDS="${SEEDS:-0 1 2 3 4}"
STEPS="${STEPS:-1200}"          # of a training, with those of the alignment at its start (300 at tiny)
ROWS="${ROWS:-pretrained t4_gidm_no_pretrain t4_gfdm_no_pretrain}"    # pretrained: the policy of the paper
CKPTS="${DEFI_CKPTS:-ckpts}"

for seed in $SEEDS; do
    for row in $ROWS; do
        name="few/$row/$seed"
        if [ -f "$CKPTS/defi/$name/meta.json" ]; then
            continue
        fi
        if [ "$row" = pretrained ]; then
            experiment=""  # the policy of the paper is no row of a table of its own
        else
            experiment="experiment=defi/$row"
        fi
        banner "Finetune $row with seed $seed"
        python -m step3_defi.train $experiment name="$name" seed="$seed" data.fraction="$FRACTION" \
            loop.max_steps="$STEPS" loop.save_every=100000 "$@"
    done
done

banner "Compare the rows"
python -m step3_defi.seeds runs="$CKPTS/defi/few" base=pretrained out=outputs/few_labels
