#!/usr/bin/env bash
# Pretrain the tiny forward and inverse model that ckpts/shipped holds, from videos of a robot and of a hand in playtable's scenes A, B and C; no action is read.
# GFDM_STEPS=1500 GIDM_STEPS=1500 scripts/pretrain_playtable.sh
MACHINE=cpu source "$(dirname "$0")/common.sh"
export OMP_NUM_THREADS=1
robot=data/playtable/ABC
hand=data/playtable/hand  # human video: one camera, and no motions that could be read

[ -d ckpts/hub/tiny/svd ] || python -m common.standins
[ -f "$robot/recording.json" ] || python -m playtable.record "scene=[A,B,C]" tasks=eleven episodes=2400 seed=1 out="$robot"
[ -f "$hand/recording.json" ] || python -m playtable.record env=playtable_hand "scene=[A,B,C]" tasks=eleven episodes=600 seed=1 out="$hand"

python -m step2_gidm.train scale=tiny \
    loop.max_steps="${GIDM_STEPS:-1500}" loop.batch_size=32 loop.schedule=cosine loop.eval_every=400 > ckpts/pretrain_gidm.log 2>&1 &
for recording in "$robot" "$hand"; do
    [ -d "$recording/latents_set" ] || python -m step1_gfdm.encode scale=tiny data="$recording/videos_set" out="$recording/latents_set" precision=auto store=bf16
done
python -m step1_gfdm.train scale=tiny \
    loop.max_steps="${GFDM_STEPS:-1500}" loop.batch_size=16 loop.schedule=cosine loop.eval_every=500 loop.optimizer.lr=1e-3
wait $!

for kind in gfdm gidm; do python -m common.ship "path=ckpts/$kind/tiny" "out=ckpts/shipped/$kind"; done
