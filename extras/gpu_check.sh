#!/usr/bin/env bash
# On a machine with a CUDA GPU, in under 8 minutes: the guards, the benchmark, ten rounds of the
# paper's run with and without --compile. Argument: a data set of train.py (cifar10).
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q tests/test_step.py tests/test_federated.py
python extras/bench.py --quick
for compile in --no-compile --compile; do
    out=$(mktemp -d)/run
    time python train.py --dataset "${1:-cifar10}" --clients 10 --alpha 0.1 --rounds 10 \
        --local-epochs 1 --device cuda "$compile" --out "$out"
    python eval.py "$out/last.pt" --finetune
done
