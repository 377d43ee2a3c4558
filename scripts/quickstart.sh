#!/usr/bin/env bash
# From a fresh clone to outputs/quickstart/report.html, on two CPU cores: record, pretrain twice, couple, roll out, print the table.
[ -f "$(dirname "$0")/../.venv/installed" ] || "$(dirname "$0")/setup.sh"
MACHINE=cpu source "$(dirname "$0")/common.sh"; A=data/playtable/A; Q=outputs/quickstart; export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1; run() { python -m "$@"; }
[ -f $A/recording.json ] || run playtable.record scene=A tasks=eleven episodes=600 out=$A; [ -d ckpts/hub/tiny/svd ] || run common.standins
(run step1_gfdm.encode scale=tiny data=$A/videos_set out=$A/latents_set limit=120 && run step1_gfdm.train scale=tiny) & (run step2_gidm.train scale=tiny && run step2_gidm.eval path=ckpts/gidm/tiny scale=tiny); wait $!
OMP_NUM_THREADS=2 run step3_defi.train scale=tiny & run step1_gfdm.eval path=ckpts/gfdm/tiny data=$A/videos_set count=16; wait $!; run step3_defi.train scale=tiny experiment=defi/blind
roll() { run step3_defi.eval scene=${3:-A} policy="$1" out="$Q/$2" sequences=100 horizon=360 "${@:4}"; }; D=ckpts/defi/tiny; B=ckpts/defi/blind
roll $D defi A tasks=eleven; roll $B blind A tasks=eleven; roll random random A tasks=eleven; roll expert expert A tasks=eleven; roll $D lifts A tasks=lifts length=1; roll $B lifts_blind A tasks=lifts length=1; roll $D unseen D tasks=eleven; roll $B unseen_blind D tasks=eleven
run step3_defi.report run=$Q
