#!/usr/bin/env bash
# On a machine with a CUDA GPU, in one call of ten minutes: the tests that matter there, the
# benchmark, ten rounds without and with --compile, then as much of the paper's run as fits.
#
#     extras/gpu_check.sh              # all of it; the run stops in order when the time is up
#     extras/gpu_check.sh continue     # more of that run; when it is whole, its evaluation
#
# Each part has a time limit, a file of output in $OUT and some lines here; one that fails stops no
# other. DEVICE=cpu and small sizes in the variables below rehearse it all without a GPU.
set -u
cd "$(dirname "$0")/.."
export DEVICE="${DEVICE:-cuda}"               # tests/test_step.py reads it, too
OUT="${OUT:-runs/gpu_check}"                  # eight small files
RUN="${RUN:-runs/gpu_check/run}"              # the run's folder, and two beside it
DATASET="${DATASET:-cifar10}" FLAGS="${FLAGS:-}" ROUNDS="${ROUNDS:-100}" SHORT="${SHORT:-10}"
BENCH="${BENCH:---quick}" EVAL="${EVAL:-}" TESTS="${TESTS:-not would_be_seen}"
ALL="${ALL:-570}" SLOW="${SLOW:-1}"           # seconds in all; the parts' limits times SLOW
mkdir -p "$OUT" "$(dirname "$RUN")"

part() {  # name, seconds, lines to show, command
    local name=$1 limit=$(($2 * SLOW)) lines=$3 left=$((ALL - SECONDS)) start=$SECONDS status=0
    shift 3
    limit=$((limit < left ? limit : left))
    [ "$limit" -gt 5 ] || { echo "== $name: no time is left"; return 1; }
    timeout --signal=TERM --kill-after=20 "$limit" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    tail -n "$lines" "$OUT/$name.txt"
    return "$status"
}

new_run=(python3 train.py --dataset "$DATASET" --clients 10 --alpha 0.1 --device "$DEVICE" $FLAGS)
if [ "${1:-}" = continue ]; then
    part run 600 3 python3 train.py --resume "$RUN/last.pt" --rounds "$ROUNDS" --device "$DEVICE"
else
    part tests 180 12 python3 -m pytest -q --durations 5 tests/test_step.py -k "$TESTS"
    part bench 170 40 python3 extras/bench.py --device "$DEVICE" $BENCH
    for mode in no-compile compile; do
        part "$mode" 80 8 "${new_run[@]}" --rounds "$SHORT" --local-epochs 1 "--$mode" \
            --out "$RUN-$mode"
    done
    mode=no-compile
    part equal 30 2 python3 - "$RUN"-{no-compile,compile}/metrics.jsonl <<'PYTHON' && mode=compile
import json, sys
late = [[json.loads(line)["knn"] for line in open(path)][-5:] for path in sys.argv[1:]]
eager, compiled = (sum(part) / len(part) for part in late)
noise = max(2.0, *(max(part) - min(part) for part in late))
print(f"kNN, mean of the last {len(late[0])} rounds: {eager:.2f} eager, {compiled:.2f} compiled")
sys.exit(f"they differ by more than {noise:.2f}" if abs(eager - compiled) > noise else 0)
PYTHON
    part run 600 3 "${new_run[@]}" --rounds "$ROUNDS" "--$mode" --out "$RUN"
fi
cp "$RUN/metrics.jsonl" "$OUT/" || exit 1
if [ "$(wc -l <"$RUN/metrics.jsonl")" -ge "$ROUNDS" ]; then
    part eval 600 20 python3 eval.py "$RUN/last.pt" --device "$DEVICE" $EVAL
fi
