#!/usr/bin/env bash
# From a fresh clone to outputs/quickstart/report.html, on two CPU cores: record, pretrain twice, couple, roll out, print the table.
[ -f "$(dirname "$0")/../.venv/installed" ] || "$(dirname "$0")/setup.sh"
MACHINE=cpu source "$(dirname "$0")/common.sh"; A=data/playtable/A; Q=outputs/quickstart; D=ckpts/defi/tiny; B=ckpts/defi/blind; mkdir -p $Q; export OMP_NUM_THREADS=1
run() { echo "== $*"; ${NICE:-} python -m "$@"; }; beside() { for line in "$@"; do run $line || return 1; done >>$Q/beside.log 2>&1 || { tail -n 30 $Q/beside.log; return 1; }; }
roll() { echo "step3_defi.eval scene=$3 policy=$1 out=$Q/$2 sequences=${N:-100} horizon=360 planner.execute=8 workers=6 ${*:4}"; }
[ -f $A/recording.json ] || run playtable.record scene=A tasks=eleven episodes=1300 out=$A; [ -d ckpts/hub/tiny/svd ] || run common.standins
NICE=nice beside "step2_gidm.train scale=tiny" "step2_gidm.eval path=ckpts/gidm/tiny scale=tiny" & run step1_gfdm.encode scale=tiny data=$A/videos_set out=$A/latents_set limit=80 precision=auto; run step1_gfdm.train scale=tiny; wait $!
NICE=nice beside "step1_gfdm.eval path=ckpts/gfdm/tiny data=$A/videos_set count=16 lpips=null" "step3_defi.train scale=tiny experiment=defi/blind loop.max_steps=800" "$(N=50 roll $B blind A tasks=eleven)" "$(N=50 roll $B lifts_blind A tasks=lifts length=1)" "$(N=50 roll expert expert A tasks=eleven)" "$(N=50 roll random random A tasks=eleven)" & run step3_defi.train scale=tiny; wait $!
NICE=nice beside "$(roll $D lifts A tasks=lifts length=1)" "$(N=30 roll $D unseen D tasks=eleven)" & run $(roll $D defi A tasks=eleven); wait $!; run step3_defi.report run=$Q
