#!/usr/bin/env bash
# What a machine with a CUDA GPU can say, in calls of at most ten minutes: gpu_check.sh PART
#   speed    benchmark, tests of the step       regime  regime R of RESULTS.md and its separation
#   as-run   other splits and first weights     paper   the paper's setting, first rounds of 100
# The same call goes on where it was cut off; SEEDS="3 4" and ROUNDS=26 add to what is there. What
# was measured and printed lies in $OUT. DEVICE=cpu and small FLAGS rehearse it without a GPU.
set -u && cd "$(dirname "$0")/.."
export DEVICE="${DEVICE:-cuda}" OMP_NUM_THREADS=1 OUT="${OUT:-runs/gpu_check}"
export DATASET="${DATASET:-data/cifar10-jpeg}" JOBS="${JOBS:-10}"; mkdir -p "$OUT"
regime="--no-amp --width 16 --local-epochs 1"
mps=nvidia-cuda-mps-control # several processes share the GPU
[ "$DEVICE" = cpu ] || { $mps -d && trap 'echo quit | $mps' EXIT; }

part() { # name, command: until 570 seconds after the start; a part that fails stops no other
    timeout --kill-after=20 $((SECONDS < 570 ? 570 - SECONDS : 1)) "${@:2}" >"$OUT/$1.txt" 2>&1
    echo "== $1: exit status $? at $SECONDS s" && tail -n 25 "$OUT/$1.txt"
}

study() { # name, seeds, rounds, flags, rows: trained, scored and measured after each of the rounds
    local before="" r folder
    for r in ${ROUNDS:-$3}; do
        folder="runs/$1/round$r"
        [ -d "$folder" ] || [ -z "$before" ] || cp -r "$before" "$folder" # to go on from there
        part "$1-$r" python3 extras/study.py "$folder" --jobs "$JOBS" --record "$OUT/$1-$r.jsonl" \
            --seeds ${SEEDS:-$2} --rows "${@:5}" --evaluation=--finetune -- --rounds "$r" \
            --clients 10 --dataset "$DATASET" --device "$DEVICE" $4 ${FLAGS:---compile}
        tail -n 100 "$folder"/*/metrics.jsonl >"$OUT/$1-$r-metrics.txt" # of unfinished runs as well
        ls "$folder" | grep "seed[0-9]*$" | part "separation-$1-$r" xargs -P "$JOBS" -I{} python3 \
            extras/separation.py "$folder/{}/last.pt" --record "$OUT/separation-$1-$r-{}.jsonl"
        before=$folder
    done
}

case "${1:-}" in
speed) part bench python3 extras/bench.py --device "$DEVICE" ${BENCH:---quick}
    part tests python3 -m pytest -q extras/tests/test_step.py ;;
regime) study rounds "0 1 2" "2 5 20" "$regime" fedalignuniform ssd ssd-common "ssd --gamma 0.2" ;;
as-run) study as-run "0 1 2 3 4" "2 5 20" "$regime --split authors --init pytorch" \
        fedalignuniform ssd-authors ssd
    study equal "0 1 2" 10 "$regime --split equal" fedalignuniform ssd
    study init "0 1 2" 10 "$regime --init pytorch" fedalignuniform ssd ;;
paper) study paper 0 13 "--split authors" fedalignuniform ssd-authors ssd ;;
*) sed -n 2,6p "$0" && exit 2 ;;
esac
