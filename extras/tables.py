"""Records of scores -> means, differences, 95 % intervals, Markdown tables."""

import json
import statistics
import subprocess
from pathlib import Path

import numpy as np

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
TABLES = {
    "accuracy": ["LP %", "FT 1 %", "FT 10 %", "kNN %", "s/round"],
    "geometry of h": ["−L_uniform h", "inter-client h", "alignment h", "eff. rank h"],
    "geometry of z": ["−L_uniform z", "inter-client z", "alignment z"],
}
PAIRED = "LP %,FT 1 %,FT 10 %,kNN %,−L_uniform h,−L_uniform z,alignment z".split(",")
# 0.975 quantiles of Student's t, of 1 to 9 degrees of freedom: NIST/SEMATECH e-Handbook, 1.3.6.7.2
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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


def current_commit():
    """The commit of this code, "+changes" behind it if files differ; "unknown" without git."""
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=+changes"]
    found = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def read(path):
    """A record's lines, a dict each."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def update(path, lines):
    """Add lines to a record, each in place of an earlier one of the same row, seed, data set."""
    kept, old = {}, read(path) if path.exists() else []
    for line in [*old, *lines]:
        kept[line["row"], line["seed"], line["transfer"]] = line
    path.write_text("".join(json.dumps(line) + "\n" for line in kept.values()))


def group(lines):
    """Lines of a record -> {data set of a transfer, or None: {row: {seed: line}}}."""
    results = {}
    for line in lines:
        rows = results.setdefault(line["transfer"], {})
        rows.setdefault(line["row"], {})[line["seed"]] = line
    return results


def tables(lines):
    """Lines of a record -> Markdown tables: all rows, and all differences to the first row."""
    parts = []
    for data_set, rows in group(lines).items():
        where = f", transfer to {data_set}" if data_set else ""
        parts += [table(name + where, headings, rows) for name, headings in TABLES.items()]
        first = next(iter(rows))
        parts += [table(f"minus {first}{where}", PAIRED, differences([rows], first), rows[first])]
    return "\n\n".join(filter(None, parts))
