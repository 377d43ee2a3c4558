#!/usr/bin/env bash
# Pretrain the tiny forward and inverse model that ckpts/shipped holds, from videos of a robot and of a hand in playtable's scenes A, B and C; no action is read.
# GFDM_STEPS=6000 GIDM_STEPS=4000 scripts/pretrain_playtable.sh     about an hour on two cores, and 20 minutes of recording
MACHINE=cpu source "$(dirname "$0")/common.sh"
export OMP_NUM_THREADS=1
robot=data/playtable/ABC
hand=data/playtable/hand  # human video: one camera, and no motions that could be read

[ -d ckpts/hub/tiny/svd ] || python -m common.standins
[ -f "$robot/recording.json" ] || python -m envs.record "scene=[A,B,C]" tasks=eleven episodes=2400 seed=1 out="$robot"
[ -f "$hand/recording.json" ] || python -m envs.record env=playtable_hand "scene=[A,B,C]" tasks=eleven episodes=600 seed=1 out="$hand"

for recording in "$robot" "$hand"; do
    [ -d "$recording/latents_set" ] || python -m step1_gfdm.encode scale=tiny data="$recording/videos_set" out="$recording/latents_set" precision=auto store=bf16
done
python -m step1_gfdm.train scale=tiny \
    loop.max_steps="${GFDM_STEPS:-6000}" loop.batch_size=16 loop.schedule=cosine loop.eval_every=1000 loop.optimizer.lr=1e-3
# the codes take over halfway: see step2_gidm/quantizer.py
python -m step2_gidm.train scale=tiny gidm.quantizer.delay=$((${GIDM_STEPS:-4000} / 2)) \
    loop.max_steps="${GIDM_STEPS:-4000}" loop.batch_size=32 loop.num_workers=2 loop.schedule=cosine loop.eval_every=1000

for kind in gfdm gidm; do python -m common.ship "path=ckpts/$kind/tiny" "out=ckpts/shipped/$kind"; done
