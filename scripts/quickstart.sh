#!/usr/bin/env bash
# From a fresh clone to outputs/quickstart/report.html, on two CPU cores in about an hour (an estimate): record
# demonstrations, couple a forward and an inverse model into a policy, finetune it, roll it out, and print the tables.
#
#   bash scripts/quickstart.sh
#   FROM_SCRATCH=1 bash scripts/quickstart.sh     also pretrains both models, in place of those in ckpts/shipped
#
# What is finished is kept: after an interruption, the same command continues. Every command below can be pasted into a
# shell at the root of the repository, once the variables are set.

if [ ! -f "$(dirname "$0")/../.venv/installed" ]; then
    "$(dirname "$0")/setup.sh"
fi
MACHINE=cpu source "$(dirname "$0")/common.sh"
export OMP_NUM_THREADS=1  # programs run side by side: one thread each is faster than threads that wait for a core

RECORDING=data/playtable/A            # demonstrations of a robot in scene A: CALVIN's format, and videos
GFDM=ckpts/gfdm/tiny                  # the forward model
GIDM=ckpts/gidm/tiny                  # the inverse model
POLICY=ckpts/defi/tiny                # the policy over both
BLIND=ckpts/defi/blind                # the same policy with black pictures, as a baseline
OUT=outputs/quickstart                # rollouts and report
LOGS=$OUT/logs                        # what the programs in the background print
ROLLOUT="horizon=360 planner.execute=8 workers=6"
mkdir -p "$LOGS"

# Some steps run beside the program in front, with lower priority, and write to a log file each.
wait_for_background() {
    if ! wait "$BACKGROUND"; then
        failed="$(ls -t "$LOGS"/*.log | head -n 1)"
        printf '\nA program in the background failed. The end of %s:\n' "$failed" >&2
        tail -n 30 "$failed" >&2
        exit 1
    fi
}

# ----------------------------------------------------------------------------------------------------------------------
# Data

if [ ! -d ckpts/hub/tiny/svd ]; then
    banner "Make small stand-ins for CLIP, T5, DINOv2 and Stable Video Diffusion"
    python -m common.standins
fi

if [ ! -f "$RECORDING/recording.json" ]; then
    banner "Record demonstrations of eleven tasks in scene A"
    python -m envs.record scene=A tasks=eleven episodes=1300 out="$RECORDING"
fi

# ----------------------------------------------------------------------------------------------------------------------
# Steps 1 and 2: the forward and the inverse model

if [ "${FROM_SCRATCH:-0}" = 1 ] || [ ! -d ckpts/shipped/gfdm ]; then
    # There is no recording of a hand here (scripts/pretrain_playtable.sh makes one), hence human_fraction=0.
    banner "Pretrain the forward model; the inverse model beside it, log: $LOGS/gidm_train.log"
    nice python -m step2_gidm.train scale=tiny paths.robot="$RECORDING" data.human_fraction=0 \
        > "$LOGS/gidm_train.log" 2>&1 &
    BACKGROUND=$!
    python -m step1_gfdm.encode scale=tiny videos="$RECORDING/videos_set" out="$RECORDING/latents_set" \
        limit=160 precision=auto
    python -m step1_gfdm.train scale=tiny paths.robot="$RECORDING" data.human_fraction=0
    wait_for_background
else
    banner "Take the forward and the inverse model from ckpts/shipped"
    mkdir -p ckpts/gfdm ckpts/gidm
    # A copy that was interrupted has the name *.part, and is made again.
    if [ ! -d "$GFDM" ]; then
        rm -rf "$GFDM.part"
        cp -r ckpts/shipped/gfdm "$GFDM.part"
        mv "$GFDM.part" "$GFDM"
    fi
    if [ ! -d "$GIDM" ]; then
        rm -rf "$GIDM.part"
        cp -r ckpts/shipped/gidm "$GIDM.part"
        mv "$GIDM.part" "$GIDM"
    fi
fi

# ----------------------------------------------------------------------------------------------------------------------
# Step 3: the policy

banner "Finetune the policy; evaluations and baselines beside it, logs: $LOGS/*.log"
(
    nice python -m step2_gidm.eval path="$GIDM" scale=tiny paths.robot="$RECORDING" data.human_fraction=0 \
        > "$LOGS/gidm_eval.log" 2>&1
    nice python -m step1_gfdm.eval path="$GFDM" videos="$RECORDING/videos_set" count=16 lpips=null \
        > "$LOGS/gfdm_eval.log" 2>&1
    nice python -m step3_defi.train scale=tiny experiment=defi/blind loop.max_steps=1400 \
        > "$LOGS/blind_train.log" 2>&1
    nice python -m step3_defi.eval policy="$BLIND" scene=A tasks=eleven sequences=50 out="$OUT/blind" $ROLLOUT \
        > "$LOGS/blind_rollout.log" 2>&1
    nice python -m step3_defi.eval policy="$BLIND" scene=A tasks=lifts length=1 sequences=50 out="$OUT/lifts_blind" \
        $ROLLOUT > "$LOGS/lifts_blind_rollout.log" 2>&1
    nice python -m step3_defi.eval policy=expert scene=A tasks=eleven sequences=50 out="$OUT/expert" $ROLLOUT \
        > "$LOGS/expert_rollout.log" 2>&1
    nice python -m step3_defi.eval policy=random scene=A tasks=eleven sequences=50 out="$OUT/random" $ROLLOUT \
        > "$LOGS/random_rollout.log" 2>&1
) &
BACKGROUND=$!
python -m step3_defi.train scale=tiny
wait_for_background

# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and report

banner "Roll the policy out in the training scene; other rollouts beside it, logs: $LOGS/*.log"
(
    nice python -m step3_defi.links path="$POLICY" scale=tiny \
        > "$LOGS/links.log" 2>&1
    nice python -m step3_defi.eval policy="$POLICY" scene=A tasks=lifts length=1 sequences=100 out="$OUT/lifts" \
        $ROLLOUT > "$LOGS/lifts_rollout.log" 2>&1
    nice python -m step3_defi.eval policy="$POLICY" scene=D tasks=eleven sequences=30 out="$OUT/unseen" $ROLLOUT \
        > "$LOGS/unseen_rollout.log" 2>&1
) &
BACKGROUND=$!
python -m step3_defi.eval policy="$POLICY" scene=A tasks=eleven sequences=100 out="$OUT/defi" $ROLLOUT
wait_for_background

banner "Write the report"
python -m step3_defi.report run="$OUT"

banner "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $OUT/report.html"
