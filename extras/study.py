"""Train and evaluate methods with several seeds each; record their scores, print their differences.

    python extras/study.py runs/first --rows fedalignuniform ssd "dsr --no-projector" --seeds 0 1 \
        --record assets/first.jsonl -- --dataset patterns --width 8 --clients 3 --alpha 1 \
        --rounds 8 --local-epochs 2 --batch-size 32 --lr 0.05
    python extras/study.py runs/mine --script mine.py --rows ssd mine -- --dataset patterns
    python extras/study.py extras/RESULTS.md    # makes a page's tables anew: extras/claims.py

A row is a method of train.py, of a script in extras/ or of --script, with more of its flags if need
be. What follows `--` is common to all rows. `local` trains every client alone, by align + uniform.

A row and a seed make one run folder (`local`: one a client, and the mean of their scores). It is
trained, and scored by eval.py, unless that is done: the same command goes on where it was stopped.
Folders that were made with other flags are refused. A record has a line for each row, seed and data
set: how it was made, its scores, and lists with a value a round for extras/figures.py. A new line
takes the place of the old one; others stay.

A small network does not fill a GPU: with --jobs 10 ten runs share it, and each writes what it says
to FOLDER.txt beside its folder. On a CPU set OMP_NUM_THREADS=1 then.
"""

import argparse
import contextlib
import functools
import json
import shlex
import statistics
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import baselines  # noqa: E402
import claims  # noqa: E402
import variants  # noqa: E402
from tables import CURVES, current_commit, mean, read, tables, update  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from model import load_checkpoint  # noqa: E402

SCRIPTS = {"train.py": train, "extras/baselines.py": baselines, "extras/variants.py": variants}
VARIANTS = ("--init", "--split", "--embed-dim")  # flags of extras/variants.py
CHANGED = ("rounds", "device", "data-dir")  # what a resumed run takes from the study's flags
ANYWHERE = {"resume", "out", "rounds", "device", "data_dir", "images"}  # may differ in a run folder


def add_script(script):
    """Let rows be of a script with a loss of your own: it has one method, of its name."""
    methods = {Path(script).stem: train.METHODS["ssd"]}
    parser = functools.partial(train.build_parser, methods)
    SCRIPTS[script] = types.SimpleNamespace(METHODS=methods, build_parser=parser)


def plan(row, seed, folder, common):
    """The runs that make a row with a seed: a list of script, flags, run folder; flags checked."""
    method, *more = shlex.split(row) or [""]
    name = "-".join(word.strip("-").replace("/", "_") for word in (method, *more))
    folder = folder / f"{name}-seed{seed}"
    alone = method == "local"
    if alone:
        method = "fedalignuniform"
    flags = [*common, "--method", method, *more, "--seed", str(seed)]
    having = [script for script, module in SCRIPTS.items() if method in module.METHODS]
    script = having[0] if having else "train.py"  # which says that there is no such method
    if alone or "--client" in more:
        script = "extras/baselines.py"
    if any(word.split("=")[0] in VARIANTS for word in [*common, *more]):
        script = "extras/variants.py"
    args = SCRIPTS[script].build_parser().parse_args(flags)
    if not alone:
        return [(script, flags, folder)]
    clients = args.clients or 10
    if args.split_file:
        clients = len(data.read_split(args.split_file))
    return [(script, [*flags, "--client", str(k)], folder / f"client-{k}") for k in range(clients)]


def train_one(script, flags, folder, output=None):
    """Train a run folder to its end, from its checkpoint if it has one; it may be there whole.

    output: a file for what the run prints. The commit of the code is noted in commits.txt.
    """
    last, module = folder / "last.pt", SCRIPTS[script]
    asked, _ = train.read_config(module.build_parser(), flags, module.METHODS)
    flags = [*flags, "--out", str(folder)]
    if last.exists():
        checkpoint, _ = load_checkpoint(last)
        there = checkpoint["config"]
        if asked["clients"] is None:
            asked["clients"] = there["clients"] if asked["split_file"] else 10
        if asked["amp"] is None:
            asked["amp"] = there["amp"]
        for name in sorted(asked.keys() - ANYWHERE):
            if asked[name] != there.get(name):
                was = f"{folder} was trained with {name} {there.get(name)}, not {asked[name]}"
                raise ValueError(f"{was}: take another folder for the study")
        if len(checkpoint["history"]) == asked["rounds"]:
            return
        flags = ["--resume", str(last)]
        for name in CHANGED:
            flags.append(f"--{name}={asked[name.replace('-', '_')]}")
    commit, commits = current_commit(), folder / "commits.txt"
    try:
        command = [sys.executable, ROOT / script, *flags]
        subprocess.run(command, check=True, stdout=output, stderr=output)
    finally:
        if last.exists():
            noted = commits.read_text().split() if commits.exists() else []
            if commit not in noted:
                commits.write_text("\n".join([*noted, commit]))


def scores(folder, data_set, flags, output=None):
    """The line of folder/eval.jsonl on a data set (None: the run's own), made if missing.

    With it seconds_per_round, the median, and knn_rounds and the like, lists of a value a round.
    output: as for `train_one`.
    """
    metrics = read(folder / "metrics.jsonl")
    data_set = data_set or json.loads((folder / "config.json").read_text())["dataset"]
    flags = [*flags, "--dataset", data_set]
    args = vars(evaluation.build_parser().parse_args(["last.pt", *flags]))

    def find():
        record = folder / "eval.jsonl"
        for line in reversed(read(record) if record.exists() else []):
            same_flags = all(args[name] == value for name, value in line["flags"].items())
            if line["dataset"] == data_set and line["round"] == len(metrics) and same_flags:
                return line

    if not find():
        command = [sys.executable, ROOT / "eval.py", folder / "last.pt", *flags]
        subprocess.run(command, check=True, stdout=output, stderr=output)
    found = find()
    if metrics:
        found["seconds_per_round"] = statistics.median(line["seconds"] for line in metrics)
        for key in CURVES:
            if all(key in line for line in metrics):
                found[f"{key}_rounds"] = [line[key] for line in metrics]
    return found


def describe(script, flags, folder):
    """How a run was made, for its line of a record; "unknown" where nothing tells."""
    config = json.loads((folder / "config.json").read_text())
    commits = folder / "commits.txt"
    return {
        "method": config["method"],
        "flags": f"{script} {shlex.join(flags)}",
        "rounds": len(read(folder / "metrics.jsonl")),
        "commit": commits.read_text().replace("\n", ", ") if commits.exists() else "unknown",
        "device": config["device_name"],
        "torch": config["versions"]["torch"],
        "threads": config["threads"],
        "date": date.fromtimestamp((folder / "last.pt").stat().st_mtime).isoformat(),
    }


def build_parser():
    """Every flag of a study; the runs' own flags follow `--`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    parser.epilog = "after --: train.py's flags, for all rows"
    add, count = parser.add_argument, train.number(int, 1)
    add("folder", type=Path, help="where the run folders lie; or PAGE.md, to renew")
    rows = ["fedalignuniform", "ssd"]
    add("--rows", nargs="+", default=rows, help="a method each, with more flags (%(default)s)")
    add("--seeds", type=train.number(int, 0), nargs="+", default=[0, 1, 2], help="(%(default)s)")
    add("--script", metavar="MINE_PY", help="a script with a loss of your own, a row of its name")
    add("--record", type=Path, help="file of the scores (scores.jsonl in the folder)")
    add("--transfer", nargs="*", default=[], metavar="DATASET", help="evaluate on these as well")
    add("--evaluation", default="", metavar="FLAGS", help="eval.py's: --evaluation=--finetune")
    add("--jobs", type=count, default=1, metavar="N", help="so many runs at a time (%(default)s)")
    return parser


def finish(row, seed, runs, args, command):
    """Train and score what is missing of a row and a seed -> its lines of the record."""
    args.folder.mkdir(parents=True, exist_ok=True)
    output = contextlib.nullcontext()
    if args.jobs > 1:
        first = runs[0][2].relative_to(args.folder).parts[0]
        output = (args.folder / f"{first}.txt").open("a")
    lines = []
    with output as file:
        for script, flags, folder in runs:
            print(f"== {row}, seed {seed}: {folder}", flush=True)
            train_one(script, flags, folder, file)
        for data_set in (None, *args.transfer):
            flags = shlex.split(args.evaluation)
            found = [scores(folder, data_set, flags, file) for _, _, folder in runs]
            line = {"row": row, "seed": seed, "transfer": data_set, **describe(*runs[0])}
            lines.append({**line, "command": command, **mean(found)})
    return lines


def main(argv=None):
    """Flags -> runs -> record -> tables; or a page with its tables anew."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = f"python extras/study.py {shlex.join(argv)}"
    cut = argv.index("--") if "--" in argv else len(argv)
    parser, common = build_parser(), argv[cut + 1 :]
    args = parser.parse_args(argv[:cut])
    record, made = args.record or args.folder / "scores.jsonl", []
    try:
        if args.folder.suffix == ".md":
            page = args.folder.read_text(encoding="utf-8")
            return args.folder.write_text(claims.renew(page), encoding="utf-8")
        if evaluation.build_parser().parse_args(["x", *shlex.split(args.evaluation)]).dataset:
            raise ValueError("--evaluation has --dataset: that is what --transfer is for")
        if args.script:
            add_script(args.script)
        tasks = []  # every flag is parsed before the first run starts
        for seed in args.seeds:  # a whole table of the first seed comes first
            for row in args.rows:
                tasks.append((row, seed, plan(row, seed, args.folder, common)))
        with ThreadPoolExecutor(args.jobs) as pool:
            run_all = pool.map if args.jobs > 1 else map
            for lines in run_all(lambda task: finish(*task, args, command), tasks):
                update(record, lines)
                made += lines
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        if args.jobs > 1:
            print(f"a run has failed: {args.folder}/*.txt say why", file=sys.stderr)
        sys.exit(error.returncode)  # it has said why
    except KeyboardInterrupt:
        sys.exit(130)  # the same command goes on
    print("\n" + tables(made))


if __name__ == "__main__":
    main()
