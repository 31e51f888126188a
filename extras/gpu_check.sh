#!/usr/bin/env bash
# What only a CUDA GPU can say, in calls of at most ten minutes; each prints as it goes and leaves
# small records in $OUT, so that one that is cut off still counts:
#
#     extras/gpu_check.sh speed      # benchmark, tests of the step
#     extras/gpu_check.sh regime     # regime R of RESULTS.md and its controls, ten runs at a time
#     extras/gpu_check.sh paper      # 13 of the paper's 100 rounds, three runs side by side
#
# Each part has a time limit and a file of output in $OUT; one that fails stops no other. The same
# call goes on where it was cut off. DEVICE=cpu and small FLAGS rehearse it all without a GPU.
set -u
cd "$(dirname "$0")/.."
export DEVICE="${DEVICE:-cuda}" OMP_NUM_THREADS=1             # test_step.py reads DEVICE, too
OUT="${OUT:-runs/gpu_check}" ALL="${ALL:-570}" JOBS="${JOBS:-10}"
DATASET="${DATASET:-data/cifar10-jpeg}" FLAGS="${FLAGS:---compile}" BENCH="${BENCH:---quick}"
SEEDS="${SEEDS:-0 1 2}" ROUNDS="${ROUNDS:-2 5 20}"            # of regime R, whose rounds are kept
common="--dataset $DATASET --device $DEVICE --clients 10 --alpha 0.1"
mkdir -p "$OUT"
if [ "$DEVICE" != cpu ]; then # several processes share the GPU
    nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control' EXIT
fi

part() {  # name, seconds, command; at most until $ALL seconds after the start
    local name=$1 limit=$2 left=$((ALL - SECONDS)) start=$SECONDS status=0
    shift 2
    limit=$((limit < left ? limit : left))
    [ "$limit" -gt 5 ] || { echo "== $name: no time is left"; return 1; }
    timeout --signal=TERM --kill-after=20 "$limit" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    tail -n 25 "$OUT/$name.txt"
}

study() {  # name, seconds, flags, rows: all seeds' runs to the end of the flags' rounds, scored
    part "$1" "$2" python3 extras/study.py "runs/$4" --jobs "$JOBS" --rows "${@:5}" \
        --seeds $SEEDS --evaluation=--finetune -- $common $3 $FLAGS
    tail -n 100 runs/"$4"/{*/metrics,*/eval,scores}.jsonl >"$OUT/$4.txt" 2>&1
}

case "${1:-}" in
speed)
    part bench 300 python3 extras/bench.py --device "$DEVICE" $BENCH
    part tests 300 python3 -m pytest -q extras/tests/test_step.py
    ;;
regime)
    for r in $ROUNDS; do
        study "train-$r" 400 "--no-amp --width 16 --local-epochs 1 --rounds $r" separation \
            fedalignuniform ssd ssd-common "ssd --gamma 0.2"
        for run in runs/separation/*-seed?; do
            [ "$(wc -l <"$run/metrics.jsonl")" -eq "$r" ] || continue # cut off, or further already
            kept="runs/rounds/round$r/$(basename "$run")"
            mkdir -p "$kept" && cp "$run/last.pt" "$kept"
        done
        ls runs/rounds/round"$r"/*/last.pt | part "separation-$r" 120 xargs -P "$JOBS" -I{} \
            python3 extras/separation.py {} --device "$DEVICE" --record {}.jsonl
        cat runs/rounds/*/*/last.pt.jsonl >"$OUT/separation.jsonl"
    done
    ;;
paper)
    SEEDS=0 study train-paper "$ALL" "--rounds ${PAPER:-13}" paper \
        fedalignuniform ssd "ssd --gamma 0.05"
    ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
