"""Train and evaluate methods with several seeds each; print scores, differences, 95 % intervals.

    python extras/study.py runs/first --rows fedalignuniform ssd "dsr --no-projector" --seeds 0 1 \
        -- --dataset patterns --width 8 --clients 3 --alpha 1 --rounds 8 --local-epochs 2 \
           --batch-size 32 --lr 0.05
    python extras/study.py extras/RESULTS.md    # writes its tables anew from assets/*.jsonl

A row is a method of train.py or of a script in extras/ and, if need be, more of its flags; what
follows `--` is common to all rows. The row `local` trains every client alone, by align + uniform,
and takes the mean of their scores. A row and a seed make one run folder (`local`: one a client),
which is trained, and scored by eval.py, unless that is done: the same command goes on where it was
stopped. Folders made with other flags are refused. The scores of the command's rows go to
scores.jsonl in the study's folder, in place of an earlier command's, a line each, and with them
what extras/figures.py draws of every round. The scale is the flags' business: without flags it is
the paper's run. One run of a small network does not fill a GPU: with --jobs 10 ten share it, and
each writes what it says to FOLDER.txt beside its folder. On a CPU OMP_NUM_THREADS=1 then keeps the
runs out of each other's way.
"""

import argparse
import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import baselines  # noqa: E402
import claims  # noqa: E402
import variants  # noqa: E402
from tables import CURVES, PAIRED, differences, mean, read, table, tables  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from model import load_checkpoint  # noqa: E402

SCRIPTS = {"train.py": train, "extras/baselines.py": baselines, "extras/variants.py": variants}
VARIANTS = ("--init", "--split", "--embed-dim")  # flags of extras/variants.py
CHANGED = ("rounds", "device", "data-dir")  # what a resumed run takes from the study's flags


def plan(row, seed, folder, common):
    """The runs that make a row with a seed: a list of script, flags, run folder; flags checked."""
    method, *more = shlex.split(row) or [""]
    name = "-".join(word.strip("-").replace("/", "_") for word in (method, *more))
    folder = folder / f"{name}-seed{seed}"
    alone = method == "local"
    method = "fedalignuniform" if alone else method
    flags = [*common, "--method", method, *more, "--seed", str(seed)]
    script = next((name for name in SCRIPTS if method in SCRIPTS[name].METHODS), "train.py")
    if alone or "--client" in more:
        script = "extras/baselines.py"
    if any(word.split("=")[0] in VARIANTS for word in [*common, *more]):
        script = "extras/variants.py"
    args = SCRIPTS[script].build_parser().parse_args(flags)
    if not alone:
        return [(script, flags, folder)]
    clients = len(data.read_split(args.split_file)) if args.split_file else args.clients or 10
    return [(script, [*flags, "--client", str(k)], folder / f"client-{k}") for k in range(clients)]


def train_one(script, flags, folder, output=None):
    """Train a run folder to its end, from its checkpoint if it has one; it may be there whole.

    output: a file for what the run prints.
    """
    module, last = SCRIPTS[script], folder / "last.pt"
    asked, _ = train.read_config(module.build_parser(), flags, module.METHODS)
    flags = [*flags, "--out", str(folder)]
    if last.exists():
        checkpoint, _ = load_checkpoint(last)
        there = checkpoint["config"]  # what was left to it to find out it has found out
        asked["clients"] = asked["clients"] or (there["clients"] if asked["split_file"] else 10)
        asked["amp"] = there["amp"] if asked["amp"] is None else asked["amp"]
        for name in sorted(
            asked.keys() - {"resume", "out", "rounds", "device", "data_dir", "images"}
        ):
            if asked[name] != there.get(name):
                raise ValueError(
                    f"{folder} was trained with {name} {there.get(name)}, not {asked[name]}: "
                    "take another folder for the study"
                )
        if len(checkpoint["history"]) == asked["rounds"]:
            return
        flags = ["--resume", str(last)]
        flags += [f"--{name}={asked[name.replace('-', '_')]}" for name in CHANGED]
    command = [sys.executable, ROOT / script, *flags]
    subprocess.run(command, check=True, stdout=output, stderr=output)


def scores(folder, data_set, flags, output=None):
    """The line of folder/eval.jsonl on a data set (None: the run's own), made if missing.

    With it seconds_per_round, the median, and knn_rounds and the like, lists of a value a round.
    output: as for `train_one`.
    """
    metrics = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    data_set = data_set or json.loads((folder / "config.json").read_text())["dataset"]
    flags, record = [*flags, "--dataset", data_set], folder / "eval.jsonl"
    args = vars(evaluation.build_parser().parse_args(["last.pt", *flags]))

    def found():
        lines = map(json.loads, record.read_text().splitlines() if record.exists() else [])
        return [
            line
            for line in lines
            if (line["dataset"], line["round"]) == (data_set, len(metrics))
            and all(args[name] == value for name, value in line["flags"].items())
        ]

    if not found():
        command = [sys.executable, ROOT / "eval.py", folder / "last.pt", *flags]
        subprocess.run(command, check=True, stdout=output, stderr=output)
    if not metrics:
        return found()[-1]
    whole = [key for key in CURVES if all(key in line for line in metrics)]
    curves = {f"{key}_rounds": [line[key] for line in metrics] for key in whole}
    seconds = statistics.median(line["seconds"] for line in metrics)
    return found()[-1] | curves | {"seconds_per_round": seconds}


def renew(page):
    """A text with the tables between `<!-- KIND: FILES -->` and `<!-- end -->` made anew.

    `<!-- claims -->`, or `<!-- claims 1 to N -->`: the table of extras/claims.py.
    KIND n > 1: rows of several seeds minus the first row, of the files of one study. n = 1: rows
    of one seed, or ROW minus ROW; FILES may then be of several studies, between them a comma.
    """

    def fill(block):
        (kind, files), found, own = block.groups(), {}, {}
        row, _, asked = kind.partition(" minus ")
        for names in files.split(", "):
            studies = [read((ROOT / name).read_text().splitlines()) for name in names.split()]
            for data_set, rows in studies[0].items():
                base, where = asked or next(iter(rows)), f" on {data_set}" * bool(data_set)
                parts = [study.get(data_set, {}) for study in studies]
                for name, runs in differences(parts, base).items():
                    if kind == "n > 1" and len(runs) > 1:
                        found[name], own = runs, rows[base]
                    elif kind == "n = 1" and len(runs) == 1 or name == row:
                        label = f"{Path(names.split()[0]).stem}{where}: {name} minus {base}"
                        found[label] = runs
        made = table(f"minus {base}" if own else "difference", PAIRED, found, own)
        return f"<!-- {kind}: {files} -->\n\n{made}\n\n<!-- end -->"

    def claims_of(block):
        last = int(block.group(1)) if block.group(1) else None
        return (
            f"{block.group(0).split(' -->')[0]} -->\n\n{claims.claims_table(last)}\n\n<!-- end -->"
        )

    page = re.sub(r"<!-- claims(?: 1 to (\d+))? -->.*?<!-- end -->", claims_of, page, flags=re.S)
    mark = r"<!-- (n [>=] 1|[^>]+ minus [^>]+): (\S+\.jsonl.*?) -->.*?<!-- end -->"
    return re.sub(mark, fill, page, flags=re.S)


def main(argv=None):
    """Flags -> runs -> scores.jsonl -> tables; or a page with its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    add = parser.add_argument
    add("folder", type=Path, help="where the run folders lie; or PAGE.md, to renew")
    rows = ["fedalignuniform", "ssd"]
    add("--rows", nargs="+", default=rows, help="a method each, with more flags (%(default)s)")
    seed = train.number(int, 0)
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    add("--transfer", nargs="*", default=[], metavar="DATASET", help="evaluate on these as well")
    add("--evaluation", default="", metavar="FLAGS", help="eval.py's: --evaluation=--finetune")
    count = train.number(int, 1)
    add("--jobs", type=count, default=1, metavar="N", help="so many runs at a time (%(default)s)")
    parser.epilog = "after --: train.py's flags, for all rows"
    argv = [*(sys.argv[1:] if argv is None else argv), "--"]
    cut = argv.index("--")
    args, common = parser.parse_args(argv[:cut]), argv[cut + 1 : -1]
    lines = []

    def finish(row_and_seed):
        """Train and score what is missing of a row and a seed: its lines of scores.jsonl."""
        (row, seed), runs, made = row_and_seed, plans[row_and_seed], []
        args.folder.mkdir(parents=True, exist_ok=True)
        said = args.folder / f"{runs[0][2].relative_to(args.folder).parts[0]}.txt"
        with said.open("a") if args.jobs > 1 else contextlib.nullcontext() as output:
            for script, run_flags, folder in runs:
                print(f"== {row}, seed {seed}: {folder}", flush=True)
                train_one(script, run_flags, folder, output)
            for data_set in (None, *args.transfer):
                found = [scores(folder, data_set, flags, output) for _, _, folder in runs]
                line = {"row": row, "seed": seed, "transfer": data_set, **mean(found)}
                made.append(json.dumps(line) + "\n")
        return made

    try:
        if args.folder.suffix == ".md":
            page = args.folder.read_text(encoding="utf-8")
            return args.folder.write_text(renew(page), encoding="utf-8")
        plans = {  # every flag is parsed before the first run starts
            (row, seed): plan(row, seed, args.folder, common)
            for seed in args.seeds  # a whole table of the first seed comes first
            for row in args.rows
        }
        flags = shlex.split(args.evaluation)
        asked = evaluation.build_parser().parse_args(["last.pt", *flags])
        if asked.dataset:
            raise ValueError("--evaluation has --dataset: that is what --transfer is for")
        with ThreadPoolExecutor(args.jobs) as pool:
            for made in (pool.map if args.jobs > 1 else map)(finish, plans):
                lines += made
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        if args.jobs > 1:
            print(f"a run has failed: {args.folder}/*.txt say why", file=sys.stderr)
        sys.exit(error.returncode)  # it has said why
    except KeyboardInterrupt:
        sys.exit(130)  # the same command goes on
    (args.folder / "scores.jsonl").write_text("".join(lines))
    print("\n" + tables(lines))


if __name__ == "__main__":
    main()
