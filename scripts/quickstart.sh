#!/usr/bin/env bash
# From a fresh clone to outputs/quickstart/report.html, on two CPU cores: record demonstrations, couple and finetune, roll out, print the tables.
# The forward and the inverse model are the ones in ckpts/shipped (scripts/pretrain_playtable.sh), where they are; FROM_SCRATCH=1 pretrains both here.
[ -f "$(dirname "$0")/../.venv/installed" ] || "$(dirname "$0")/setup.sh"
MACHINE=cpu source "$(dirname "$0")/common.sh"
export OMP_NUM_THREADS=1
recording=data/playtable/A
robot_alone="paths.robot=$recording data.human_fraction=0"  # the one recording at hand, without the hand that pretrain_playtable.sh films
out=outputs/quickstart
policy=ckpts/defi/tiny
blind=ckpts/defi/blind
mkdir -p "$out"

run() { echo "== python -m $*"; ${NICE:-} python -m "$@"; }
# Programs that run beside the one in front, at lower priority; what they print is kept in beside.log and shown where one fails.
beside() { for line in "$@"; do NICE=nice run $line || return 1; done >> "$out/beside.log" 2>&1 || { tail -n 30 "$out/beside.log"; return 1; }; }
rollout() { echo "step3_defi.eval scene=$3 policy=$1 out=$out/$2 sequences=${sequences:-100} horizon=360 planner.execute=8 workers=6 ${*:4}"; }

[ -d ckpts/hub/tiny/svd ] || run common.standins
[ -f "$recording/recording.json" ] || run envs.record scene=A tasks=eleven episodes=1300 out="$recording"

if [ "${FROM_SCRATCH:-0}" = 1 ] || [ ! -d ckpts/shipped/gfdm ]; then
    beside "step2_gidm.train scale=tiny $robot_alone" &
    run step1_gfdm.encode scale=tiny data="$recording/videos_set" out="$recording/latents_set" limit=160 precision=auto
    run step1_gfdm.train scale=tiny $robot_alone
    wait $!
else
    for kind in gfdm gidm; do
        [ ! -d "ckpts/$kind/tiny" ] || continue
        mkdir -p "ckpts/$kind" && rm -rf "ckpts/$kind/tiny.part"
        cp -r "ckpts/shipped/$kind" "ckpts/$kind/tiny.part" && mv "ckpts/$kind/tiny.part" "ckpts/$kind/tiny"
    done
fi

beside "step2_gidm.eval path=ckpts/gidm/tiny scale=tiny $robot_alone" \
       "step1_gfdm.eval path=ckpts/gfdm/tiny data=$recording/videos_set count=16 lpips=null" \
       "step3_defi.train scale=tiny experiment=defi/blind loop.max_steps=1400" \
       "$(sequences=50 rollout $blind blind A tasks=eleven)" "$(sequences=50 rollout $blind lifts_blind A tasks=lifts length=1)" \
       "$(sequences=50 rollout expert expert A tasks=eleven)" "$(sequences=50 rollout random random A tasks=eleven)" &
run step3_defi.train scale=tiny
wait $!

beside "step3_defi.links path=$policy scale=tiny" "$(rollout $policy lifts A tasks=lifts length=1)" "$(sequences=30 rollout $policy unseen D tasks=eleven)" &
run $(rollout $policy defi A tasks=eleven)
wait $!
run step3_defi.report run="$out"
