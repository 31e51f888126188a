"""The tables of README and RESULTS, from assets/: verdicts on the paper's claims, and the studies'.

A claim has a text, the paper's value and the sign it predicts, and for each form of SSD, as printed
(gamma = 1) and as run (the authors' form), a row, what it is compared with, and the records of the
runs. A verdict is the sign of the mean difference, if its 95 % interval leaves out zero. For the
verdict a standard deviation counts as the noise floor where it is smaller: that of repeats of the
same seed on two machines. Seeds that happen to agree are no precision. Two claims that are one (z
more uniform *and* better aligned) have one verdict: opposite if one of them is, same sign if both.
"""

import json
import re
import statistics
from pathlib import Path

import numpy as np
from tables import COLUMNS, PAIRED, T, cell, differences, group, read, table

ASSETS = Path(__file__).parent.parent / "assets"
REPEATS = ("regime", "regime-cpu")  # the same seeds on two machines


def scores(name):
    """{row: {seed: scores}} of a record on its own data set; {} if it is not there yet."""
    path = ASSETS / f"{name}.jsonl"
    return group(read(path))[None] if path.exists() else {}


def read_claims():
    """All claims, a dict each, in the order of their numbers."""
    return json.loads((ASSETS / "claims.json").read_text())


def noise_floor(column):
    """Root mean square of the differences of repeats in a column, and their number."""
    key, _, _ = COLUMNS[column]
    one, two = (scores(name) for name in REPEATS)
    off = []
    for row in one:
        for seed in one[row]:
            if key in one[row][seed] and key in two.get(row, {}).get(seed, {}):
                off.append(one[row][seed][key] - two[row][seed][key])
    return (sum(value**2 for value in off) / len(off)) ** 0.5 if off else 0.0, len(off)


def compare(claim, form):
    """The paired differences of a claim in a form, one a seed; [] if nothing was run."""
    if form not in claim:
        return []
    key, factor, _ = COLUMNS[claim["column"]]
    task = claim[form]
    runs = differences([scores(name) for name in task["records"]], task["base"])
    return [factor * run[key] for run in runs.get(task["row"], {}).values() if key in run]


def t_value(values, floor):
    """The mean over its standard error, of a std that is the noise floor at least."""
    deviation = max(statistics.stdev(values), floor)
    return statistics.mean(values) / (deviation / len(values) ** 0.5)


def verdict(values, sign, floor):
    """`same sign`, `opposite`, or `cannot tell` for differences, by their floored interval."""
    t = t_value(values, floor)
    if abs(t) < T[min(len(values), 10) - 2]:
        return "cannot tell"
    return "same sign" if t * sign > 0 else "opposite"


def judge(claim, form, claims):
    """A claim's verdict in a form, together with the claim that it is one with."""
    if "judged_with" in claim:
        return f"with {claim['judged_with']}"
    parts = [claim]
    if "with" in claim:
        parts.append(next(other for other in claims if other["number"] == claim["with"]))
    found = set()
    for part in parts:
        floor, _ = noise_floor(part["column"])
        found.add(verdict(compare(part, form), part["sign"], floor))
    for word in ("opposite", "cannot tell", "same sign"):
        if word in found:
            return word


def p_value(values, floor):
    """Two-sided p of Student's t, by numerical integration of its density."""
    freedom = len(values) - 1
    x = np.linspace(0, abs(t_value(values, floor)), 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    far = np.tan(np.linspace(0, np.pi / 2, 2_000_001)[:-1])
    whole = np.trapezoid((1 + far**2 / freedom) ** (-(freedom + 1) / 2), far)
    return 1 - np.trapezoid(density, x) / whole


def holm(p_values, level=0.05):
    """How many of the claims stand after Holm's correction for their number."""
    stand = 0
    for i, p in enumerate(sorted(p_values)):
        if p > level / (len(p_values) - i):
            break
        stand += 1
    return stand


def claims_table(last=None):
    """Markdown of the claims up to number `last`, both forms, and a line on Holm's correction."""
    claims = read_claims()[:last]
    lines = [
        "| the paper's claim | paper | as printed (γ = 1): mean (95 % interval), n | verdict "
        "| as run (authors' form) | verdict |",
        "|---|---|---|---|---|---|",
    ]
    p_values = []
    for claim in claims:
        digits = COLUMNS[claim["column"]][2]
        name = f"{claim['number']} {claim['claim']}"
        if last is None:
            name += f", {claim['images']} images"
        line = [name, claim["paper"]]
        for form in ("printed", "run"):
            values = compare(claim, form)
            if len(values) < 2:
                line += ["not run" if form in claim else "–", "–"]
                continue
            line.append(f"{cell(values, digits, True)}, {len(values)}")
            line.append(judge(claim, form, claims))
            p_values.append(p_value(values, noise_floor(claim["column"])[0]))
        lines.append(f"| {' | '.join(line)} |")
    count = f"{holm(p_values)} of the {len(p_values)} comparisons"
    lines += ["", f"After Holm's correction for their number {count} leave out zero."]
    return "\n".join(lines)


def study_table(kind, files):
    """Markdown for the marker KIND: FILES, as `renew` explains them."""
    row, _, asked = kind.partition(" minus ")
    found, base_runs = {}, {}
    for names in files.split(", "):
        studies = [group(read(ASSETS.parent / name)) for name in names.split()]
        for data_set, rows in studies[0].items():
            base = asked or next(iter(rows))
            where = f" on {data_set}" if data_set else ""
            parts = [study.get(data_set, {}) for study in studies]
            for name, runs in differences(parts, base).items():
                if kind == "n > 1" and len(runs) > 1:
                    found[name], base_runs = runs, rows[base]
                elif (kind == "n = 1" and len(runs) == 1) or name == row:
                    study = Path(names.split()[0]).stem
                    found[f"{study}{where}: {name} minus {base}"] = runs
    heading = f"minus {base}" if base_runs else "difference"
    return table(heading, PAIRED, found, base_runs)


def renew(page):
    """A page with what stands between its markers and the next `<!-- end -->` made anew.

    <!-- claims -->, <!-- claims 1 to N -->    the paper's claims, all or the first N
    <!-- n > 1: FILES -->                      rows of several seeds, each minus the first row; the
                                               files are of one study, on several machines
    <!-- n = 1: FILES -->                      rows of one seed, each minus the first row
    <!-- ROW minus ROW: FILES -->              this difference; commas part the studies
    """

    def fill(block):
        marker, last, kind, files = block.groups()
        if kind:
            made = study_table(kind, files)
        else:
            made = claims_table(int(last) if last else None)
        return f"<!-- {marker} -->\n\n{made}\n\n<!-- end -->"

    claims_marker = r"claims(?: 1 to (\d+))?"
    study_marker = r"(n > 1|n = 1|[^>]+ minus [^>]+): (\S+\.jsonl.*?)"
    pattern = f"<!-- ({claims_marker}|{study_marker}) -->.*?<!-- end -->"
    return re.sub(pattern, fill, page, flags=re.S)
