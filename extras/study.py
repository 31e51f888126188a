"""Train and evaluate methods with several seeds each; print a table, mean +- std over the seeds.

    python extras/study.py runs/first --rows fedalignuniform ssd "dsr --no-projector" --seeds 0 1 \
        -- --dataset shapes --width 16 --clients 5 --alpha 1 --rounds 10 --local-epochs 1 \
           --batch-size 64 --lr 0.03

A row is a method of train.py, or extras/baselines.py and, if need be, more of its
flags; what follows `--` is common to all rows. The row `local` trains every client alone, by align
+ uniform, in every round, and takes the mean of their scores. A row and a seed make one run folder
(`local`: one a client), which is trained, and scored by eval.py, unless that is done: the same
command goes on where it was stopped, and prints the table alone once all is there. Folders made
with other flags are refused. All scores go to scores.jsonl in the study's folder, a line each.
The scale is the flags' business: without flags it is the paper's run.
"""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import baselines  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402

SCRIPTS = {"train.py": train, "extras/baselines.py": baselines}
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
    "s/round": ("seconds_per_round", 1, 1),
}


def plan(row, seed, folder, common):
    """The runs that make a row with a seed: a list of script, flags, run folder; flags checked."""
    method, *more = shlex.split(row) or [""]
    name = "-".join(word.strip("-").replace("/", "_") for word in (method, *more))
    folder = folder / f"{name}-seed{seed}"
    alone = method == "local"
    method = "fedalignuniform" if alone else method
    flags = [*common, "--method", method, *more, "--seed", str(seed)]
    own = alone or method not in train.METHODS or "--client" in more
    script = "extras/baselines.py" if own else "train.py"
    args = SCRIPTS[script].build_parser().parse_args(flags)
    if not alone:
        return [(script, flags, folder)]
    clients = len(train.read_split(args.split_file)) if args.split_file else args.clients or 10
    return [(script, [*flags, "--client", str(k)], folder / f"client-{k}") for k in range(clients)]


def train_one(script, flags, folder):
    """Train a run folder to its end, from its checkpoint if it has one; it may be there whole."""
    module, last = SCRIPTS[script], folder / "last.pt"
    parser = module.build_parser()
    asked, _ = train.read_config(parser, flags, module.METHODS)
    if last.exists():
        flags = ["--resume", str(last), "--rounds", str(asked["rounds"])]
        there, checkpoint = train.read_config(parser, flags, module.METHODS)
        for name in sorted(asked.keys() - train.MAY_CHANGE - {"out"}):
            if asked[name] != there[name] and (name, asked[name]) != ("amp", None):
                raise ValueError(
                    f"{folder} was trained with {name} {there[name]}, not {asked[name]}: "
                    "take another folder for the study"
                )
        if checkpoint["round"] == asked["rounds"]:
            return
    else:
        flags = [*flags, "--out", str(folder)]
    subprocess.run([sys.executable, ROOT / script, *flags], check=True)


def scores(folder, data_set, flags):
    """The line of folder/eval.jsonl on a data set (None: the run's own), made if missing."""
    rounds = len((folder / "metrics.jsonl").read_text().splitlines())
    data_set = data_set or json.loads((folder / "config.json").read_text())["dataset"]
    flags, record = [*flags, "--dataset", data_set], folder / "eval.jsonl"
    args = vars(evaluation.build_parser().parse_args(["last.pt", *flags]))

    def found():
        lines = map(json.loads, record.read_text().splitlines() if record.exists() else [])
        return [
            line
            for line in lines
            if (line["dataset"], line["round"]) == (data_set, rounds)
            and "flags" in line
            and all(args[name] == value for name, value in line["flags"].items())
        ]

    if not found():
        command = [sys.executable, ROOT / "eval.py", folder / "last.pt", *flags]
        subprocess.run(command, check=True)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    seconds = [line["seconds"] for line in lines]
    return found()[-1] | ({"seconds_per_round": statistics.median(seconds)} if seconds else {})


def mean(runs):
    """The mean of every score that all runs have."""
    keys = [key for key, _, _ in COLUMNS.values() if all(key in run for run in runs)]
    return {key: statistics.mean(run[key] for run in runs) for key in keys}


def table(rows):
    """Markdown of rows {label: [scores of a seed, ...]}, without the columns that have no value."""
    columns = {
        name: spec
        for name, spec in COLUMNS.items()
        if any(spec[0] in run for runs in rows.values() for run in runs)
    }
    lines = ["| | " + " | ".join(columns) + " | n |", "|---" * (len(columns) + 2) + "|"]
    for label, runs in rows.items():
        cells = []
        for key, factor, digits in columns.values():
            values = [factor * run[key] for run in runs if key in run]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join(lines)


def main(argv=None):
    """Flags -> runs -> one table for the runs' own data set and one for every transfer."""
    parser = evaluation.OneLineParser("extras/study.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="where the run folders lie, e.g. runs/ablation")
    add(
        "--rows",
        nargs="+",
        default=["fedalignuniform", "ssd"],
        help="a method each, and more flags in the same string (fedalignuniform ssd)",
    )
    add("--seeds", type=train.number(int, 0), nargs="+", default=[0, 1, 2], help="(%(default)s)")
    add("--transfer", nargs="*", default=[], metavar="DATASET", help="evaluate on these as well")
    add("--evaluation", default="", metavar="FLAGS", help="eval.py's: --evaluation='--own-images'")
    parser.epilog = "after --: train.py's flags, for all rows"
    argv = [*(sys.argv[1:] if argv is None else argv), "--"]
    cut = argv.index("--")
    args, common = parser.parse_args(argv[:cut]), argv[cut + 1 : -1]
    results = {}
    try:
        plans = {  # every flag is checked before the first run starts
            (row, seed): plan(row, seed, args.folder, common)
            for seed in args.seeds  # a whole table of the first seed comes first
            for row in args.rows
        }
        flags = shlex.split(args.evaluation)
        asked = evaluation.build_parser().parse_args(["last.pt", *flags])
        if asked.dataset:
            raise ValueError("--evaluation has --dataset: that is what --transfer is for")
        if asked.own_images and args.transfer:
            raise ValueError("--own-images and --transfer exclude each other: run the study twice")
        for (row, seed), runs in plans.items():
            for script, run_flags, folder in runs:
                print(f"== {row}, seed {seed}: {folder}", flush=True)
                train_one(script, run_flags, folder)
            for data_set in (None, *args.transfer):
                found = [scores(folder, data_set, flags) for _, _, folder in runs]
                results.setdefault(data_set, {}).setdefault(row, []).append((seed, mean(found)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why
    with (args.folder / "scores.jsonl").open("w") as file:
        for data_set, rows in results.items():
            for row, runs in rows.items():
                for seed, run in runs:
                    line = {"row": row, "seed": seed, "transfer": data_set, **run}
                    file.write(json.dumps(line) + "\n")
    for data_set, rows in results.items():
        print(f"\n{f'transfer to {data_set}' if data_set else 'own data set'}\n")
        print(table({row: [run for _, run in runs] for row, runs in rows.items()}))


if __name__ == "__main__":
    main()
