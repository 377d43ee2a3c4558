#!/usr/bin/env bash
# Pretrain the tiny forward and the tiny inverse model that ckpts/shipped holds, from videos of a robot and of a hand in
# scenes A, B and C of playtable. No action is read. It takes 20 minutes of recording and about an hour of training on
# two cores; after an interruption, the same command continues.
#
#   scripts/pretrain_playtable.sh
#   GFDM_STEPS=6000 GIDM_STEPS=4000 scripts/pretrain_playtable.sh
MACHINE=cpu source "$(dirname "$0")/common.sh"
export OMP_NUM_THREADS=1

GFDM_STEPS="${GFDM_STEPS:-6000}"
GIDM_STEPS="${GIDM_STEPS:-4000}"
ROBOT=data/playtable/ABC    # videos of the robot, two cameras
HAND=data/playtable/hand    # videos of a hand as human video: one camera, and no motions

if [ ! -d ckpts/hub/tiny/svd ]; then
    banner "Make small stand-ins for CLIP, T5, DINOv2 and Stable Video Diffusion"
    python -m common.standins
fi

if [ ! -f "$ROBOT/recording.json" ]; then
    banner "Record the robot"
    python -m envs.record "scene=[A,B,C]" tasks=eleven episodes=2400 seed=1 out="$ROBOT"
fi
if [ ! -f "$HAND/recording.json" ]; then
    banner "Record the hand"
    python -m envs.record env=playtable_hand "scene=[A,B,C]" tasks=eleven episodes=600 seed=1 out="$HAND"
fi

for recording in "$ROBOT" "$HAND"; do
    if [ ! -d "$recording/latents_set" ]; then
        banner "Encode the videos of $recording"
        python -m step1_gfdm.encode scale=tiny videos="$recording/videos_set" out="$recording/latents_set" \
            precision=auto store=bf16
    fi
done

banner "Pretrain the forward model (step 1)"
python -m step1_gfdm.train scale=tiny loop.max_steps="$GFDM_STEPS" loop.batch_size=16 loop.schedule=cosine \
    loop.eval_every=1000 loop.optimizer.lr=1e-3

banner "Pretrain the inverse model (step 2)"
# In the first half, the decoder reads the latent actions before they are quantized; step2_gidm/quantizer.py says why.
python -m step2_gidm.train scale=tiny loop.max_steps="$GIDM_STEPS" loop.batch_size=32 loop.schedule=cosine \
    loop.eval_every=1000 loop.num_workers=2 gidm.quantizer.delay=$((GIDM_STEPS / 2))

banner "Write both models to ckpts/shipped"
for kind in gfdm gidm; do
    if [ -d "ckpts/shipped/$kind" ]; then
        echo "ckpts/shipped/$kind exists and is kept. To replace it by ckpts/$kind/tiny, remove it and start again."
    else
        python -m common.ship path="ckpts/$kind/tiny" out="ckpts/shipped/$kind"
    fi
done

banner "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
