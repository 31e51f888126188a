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

import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import baselines  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from model import load_checkpoint  # noqa: E402

SCRIPTS = {"train.py": train, "extras/baselines.py": baselines}
COLUMNS = {  # heading: key of eval.jsonl, factor, digits
    "LP %": ("linear_probe", 1, 2),
    "FT 1 %": ("finetune_0.01", 1, 2),
    "FT 10 %": ("finetune_0.1", 1, 2),
    "kNN %": ("knn", 1, 2),
    "−L_uniform h": ("uniformity_h", -1, 3),
    "−L_uniform z": ("uniformity_z", -1, 3),
    "inter-client h": ("uniformity_inter_h", -1, 3),
    "inter-client z": ("uniformity_inter_z", -1, 3),
    "alignment z": ("alignment_z", 1, 3),
    "alignment h": ("alignment_h", 1, 3),
    "eff. rank h": ("effective_rank_h", 1, 1),
    "s/round": ("seconds_per_round", 1, 1),
}
CURVES = ("knn", "align", "uniformity_h", "uniformity_z")  # of metrics.jsonl
CHANGED = ("rounds", "device", "data-dir")  # what a resumed run takes from the study's flags
TABLES = {
    "accuracy": ["LP %", "FT 1 %", "FT 10 %", "kNN %", "s/round"],
    "geometry of h": ["−L_uniform h", "inter-client h", "alignment h", "eff. rank h"],
    "geometry of z": ["−L_uniform z", "inter-client z", "alignment z"],
}
CROSSWISE = {  # heading: key of extras/separation.py's lines, space
    "inter-client −L_uniform of z": ("inter", "z"),
    "share of z in own dimensions": ("own_share", "z"),
    "inter-client −L_uniform of h": ("inter", "h"),
}
PAIRED = "LP %,FT 1 %,FT 10 %,kNN %,−L_uniform h,−L_uniform z,alignment z,eff. rank h".split(",")
# 0.975 quantiles of Student's t, of 1 to 9 degrees of freedom: NIST/SEMATECH e-Handbook, 1.3.6.7.2
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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
        for name in sorted(asked.keys() - {"resume", "out", "rounds", "device", "data_dir"}):
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


def mean(runs):
    """The mean of every score, and every round's, that all runs have."""
    keys = [key for key, _, _ in COLUMNS.values()] + [f"{key}_rounds" for key in CURVES]
    keys = [key for key in keys if all(key in run for run in runs)]
    return {key: np.mean([run[key] for run in runs], axis=0).tolist() for key in keys}


def differences(studies, base):
    """{row: {seed: scores minus the base row's}}, of one or more {row: {seed: scores}}.

    A row is compared within its study or, if that has no base, with an earlier one's, in the seeds
    that both have. A seed that two studies have is a repeat: the first counts.
    """
    keys, own, found = [key for key, _, _ in COLUMNS.values()], {}, {}
    for rows in studies:
        own = rows.get(base, own)
        for row in (row for row in rows if row != base):
            pairs = {seed: (run, own[seed]) for seed, run in rows[row].items() if seed in own}
            for seed, (a, b) in pairs.items():
                if new := {key: a[key] - b[key] for key in keys if key in a and key in b}:
                    found.setdefault(row, {}).setdefault(seed, new)
    return found


def interval(values):
    """Mean of n values and half its 95 % interval, t std / sqrt(n); a bit too wide if n > 10."""
    n = len(values)
    half = T[min(n, 10) - 2] * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    return statistics.mean(values), half


def cell(values, digits, paired):
    """`mean ± std`; of differences `mean (low to high)`, the ends of the 95 % interval."""
    if not values:
        return "–"
    middle, half = interval(values)
    ends = (f"{end:{'+' * paired}.{digits}f}" for end in (middle, middle - half, middle + half))
    mean, low, high = (end.replace("-", "−") for end in ends)
    if len(values) > 1:
        mean += f" ({low} to {high})" if paired else f" ± {statistics.stdev(values):.{digits}f}"
    return mean


def table(name, headings, rows, base=None):
    """Markdown of rows {label: {seed: scores}}, "" if empty; columns without a value left out.

    base: the rows are differences, and {seed: scores} of what was subtracted; its means come first.
    """
    there = {key for runs in rows.values() for run in runs.values() for key in run}
    headings = [heading for heading in headings if COLUMNS[heading][0] in there][:6]
    lines = [[name, *headings, "n"], ["---"] * (len(headings) + 2)]
    for label, runs in ({"itself": base, **rows} if base else rows).items():
        found = [label]
        for key, factor, digits in map(COLUMNS.get, headings):
            values = [factor * run[key] for run in runs.values() if key in run]
            text = cell(values, digits, base is not None and runs is not base)
            found.append(text.split()[0] if runs is base else text)
        lines.append([*found, str(len(runs))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines if headings)


def read(lines):
    """Lines of scores.jsonl -> {data set of a transfer, or None: {row: {seed: scores}}}."""
    results = {}
    for line in map(json.loads, lines):
        row, seed, data_set = (line.pop(name) for name in ("row", "seed", "transfer"))
        results.setdefault(data_set, {}).setdefault(row, {})[seed] = line
    return results


def crosswise(lines, heading, minus=None):
    """Markdown of a value of extras/separation.py's lines, a column a row, mean ± std over seeds.

    minus: a row; then its mean, and of the differences to it, with their 95 % interval.
    """
    (key, space), found = CROSSWISE[heading], {}
    lines = [line for line in lines if line["space"] == space and key in line]
    for line in sorted(lines, key=lambda line: line["round"]):
        rows = found.setdefault(f"round {line['round']}, {line['variant']}", {})
        rows.setdefault(line["row"], {})[line["seed"]] = line[key]
    columns = [row for row in dict.fromkeys(line["row"] for line in lines) if row != minus]
    text = [[heading + f", minus {minus}" * bool(minus), *["itself"] * bool(minus), *columns]]
    text.append(["---"] * len(text[0]))
    for name, rows in found.items():
        own = rows.get(minus, {})
        text.append([name, *[cell([*own.values()], 3, False).split()[0]] * bool(minus)])
        for runs in (rows.get(row, {}) for row in columns):
            if minus:
                runs = {seed: runs[seed] - own[seed] for seed in runs if seed in own}
            text[-1].append(cell([*runs.values()], 3, bool(minus)))
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def tables(lines):
    """Lines of scores.jsonl -> Markdown tables: all rows, and all differences to the first row."""
    parts = []
    for data_set, rows in read(lines).items():
        where = f", transfer to {data_set}" if data_set else ""
        parts += [table(name + where, headings, rows) for name, headings in TABLES.items()]
        first = next(iter(rows))
        parts += [table(f"minus {first}{where}", PAIRED, differences([rows], first), rows[first])]
    return "\n\n".join(filter(None, parts))


def renew(page):
    """A text with the tables between `<!-- KIND: FILES -->` and `<!-- end -->` made anew.

    KIND n > 1: rows of several seeds minus the first row, of the files of one study. n = 1: rows
    of one seed, or ROW minus ROW; FILES may then be of several studies, between them a comma.
    crosswise: inter-client -L_uniform of z minus the first row's, of a file of separation.py: three
    of its variants, in runs of one local epoch.
    """

    def fill(block):
        (kind, files), found, own = block.groups(), {}, {}
        if kind == "crosswise":
            lines = [json.loads(line) for line in (ROOT / files).open()]
            shown = "own", "average", "same-images"
            lines = [x for x in lines if x["variant"] in shown and x["epochs"] == 1]
            made = crosswise(lines, next(iter(CROSSWISE)), lines[0]["row"])
            return f"<!-- {kind}: {files} -->\n\n{made}\n\n<!-- end -->"
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

    mark = r"<!-- (crosswise|n [>=] 1|[^>]+ minus [^>]+): (\S+\.jsonl.*?) -->.*?<!-- end -->"
    return re.sub(mark, fill, page, flags=re.S)


def main(argv=None):
    """Flags -> runs -> scores.jsonl -> tables; or a page with its tables anew."""
    parser = evaluation.one_line_parser("extras/study.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="where the run folders lie; or PAGE.md, to renew")
    rows = ["fedalignuniform", "ssd"]
    add("--rows", nargs="+", default=rows, help="a method each, with more flags (%(default)s)")
    seed = train.number(int, 0)
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    add("--transfer", nargs="*", default=[], metavar="DATASET", help="evaluate on these as well")
    add("--evaluation", default="", metavar="FLAGS", help="eval.py's: --evaluation='--own-images'")
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
        if asked.own_images and args.transfer:
            raise ValueError("--own-images and --transfer exclude each other: run the study twice")
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
