"""Train and evaluate methods with several seeds each; print a table, mean +- std over the seeds.

    python extras/study.py runs/first --rows fedalignuniform ssd "dsr --no-projector" --seeds 0 1 \
        -- --dataset shapes --width 16 --clients 5 --alpha 1 --rounds 10 --local-epochs 1 \
           --batch-size 64 --lr 0.03

A row is a method of train.py and, if need be, more of its flags; what follows `--` is common to all
rows. A row and a seed make one run folder, which is trained by train.py and scored by eval.py
unless that is done (remove eval.jsonl to score anew): the same command goes on where it was
stopped, and prints the table alone once all is there. The scale is the flags' business: without
flags it is the paper's run.
"""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from eval import OneLineParser  # noqa: E402
from train import build_parser, number, read_config  # noqa: E402

COLUMNS = {  # heading: key of eval.jsonl, factor, digits
    "LP %": ("linear_probe", 1, 2),
    "FT 1 %": ("finetune_0.01", 1, 2),
    "FT 10 %": ("finetune_0.1", 1, 2),
    "kNN %": ("knn", 1, 2),
    "−L_uniform h": ("uniformity_h", -1, 3),
    "z": ("uniformity_z", -1, 3),
    "inter-client h": ("uniformity_inter_h", -1, 3),
    "inter z": ("uniformity_inter_z", -1, 3),
    "align z": ("alignment_z", 1, 3),
    "align h": ("alignment_h", 1, 3),
    "eff. rank h": ("effective_rank_h", 1, 1),
}


def train_one(flags, folder):
    """Train a run folder to its end, from its checkpoint if it has one; it may be there whole."""
    last = folder / "last.pt"
    if last.exists():
        flags = [*flags, "--resume", str(last)]
        config, checkpoint, _ = read_config(build_parser(), flags)  # refuses other flags
        if checkpoint["round"] == config["rounds"]:
            return
    else:
        flags = [*flags, "--out", str(folder)]
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)


def scores(folder, data_set, flags):
    """The last line of folder/eval.jsonl on a data set (None: the run's own), made if missing."""
    rounds = len((folder / "metrics.jsonl").read_text().splitlines())
    wanted = data_set or json.loads((folder / "config.json").read_text())["dataset"]
    record = folder / "eval.jsonl"

    def found():
        lines = map(json.loads, record.read_text().splitlines() if record.exists() else [])
        return [line for line in lines if (line["dataset"], line["round"]) == (wanted, rounds)]

    if not found():
        other = ["--dataset", data_set] if data_set else []
        command = [sys.executable, ROOT / "eval.py", folder / "last.pt", *flags, *other]
        subprocess.run(command, check=True)
    return found()[-1]


def table(rows):
    """Markdown of rows {label: [scores of a seed, ...]}, without the columns that have no value."""
    first = next(iter(rows.values()))[0]
    columns = {name: spec for name, spec in COLUMNS.items() if spec[0] in first}
    lines = ["| | " + " | ".join(columns) + " | n |", "|---" * (len(columns) + 2) + "|"]
    for label, runs in rows.items():
        cells = []
        for key, factor, digits in columns.values():
            values = [factor * run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join(lines)


def main(argv=None):
    """Flags -> runs -> one table for the runs' own data set and one for every transfer."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="where the run folders lie, e.g. runs/ablation")
    add(
        "--rows",
        nargs="+",
        default=["fedalignuniform", "ssd"],
        help="a method each, and more flags in the same string (fedalignuniform ssd)",
    )
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="(%(default)s)")
    add("--transfer", nargs="*", default=[], metavar="DATASET", help="evaluate on these as well")
    add("--evaluation", default="", metavar="FLAGS", help="eval.py's flags, one string")
    parser.epilog = "after --: train.py's flags, for all rows"
    argv = [*(sys.argv[1:] if argv is None else argv), "--"]
    cut = argv.index("--")
    args, common = parser.parse_args(argv[:cut]), argv[cut + 1 : -1]
    runs = {}
    for row in args.rows:  # every flag is checked before the first run starts
        for seed in args.seeds:
            words = shlex.split(row)
            flags = [*common, "--method", *words, "--seed", str(seed)]
            build_parser().parse_args(flags)
            name = "-".join(word.strip("-").replace("/", "_") for word in words)
            runs[row, seed] = flags, args.folder / f"{name}-seed{seed}"
    results = {}
    try:
        for seed in args.seeds:  # a whole table of the first seed comes first
            for row in args.rows:
                flags, folder = runs[row, seed]
                print(f"== {row}, seed {seed}: {folder}", flush=True)
                train_one(flags, folder)
                for data_set in (None, *args.transfer):
                    result = scores(folder, data_set, shlex.split(args.evaluation))
                    results.setdefault(data_set, {}).setdefault(row, []).append(result)
    except ValueError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why
    for data_set, rows in results.items():
        print(f"\n{f'transfer to {data_set}' if data_set else 'own data set'}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
