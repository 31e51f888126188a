"""Where an average of networks leans: the law, and all tables of extras/separation.py's record.

Client k's network puts the share q_kj of ||z||^2 into client j's dimensions. The average of the
networks, weighted by p_k, puts there, up to one factor for all clients:

    share_j = (sum_k p_k sqrt(q_kj))^2

The law takes all networks' outputs u for equally long, and their parts in client j's dimensions for
parallel: then lengths add up, and a length is the root of a share. If the networks lean alike, each
to its own client, equal weights make an average that leans to nobody. If each network fills its own
dimensions alone, the average's shares go with p_k^2.

    python extras/law.py assets/separation.jsonl    # prints the tables
    python extras/law.py extras/RESULTS.md          # writes the page's tables anew
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "extras")]

from tables import cell  # noqa: E402

PARTS = {  # variant of the record: what is the client's own in the network, the rest is common
    "swap-none": "nothing",
    "swap-encoder": "encoder",
    "swap-all-but-last": "all but the last layer",
    "swap-last": "last layer alone",
    "same-images": "everything",
}


def predict(q, p, total):
    """The law's shares (K,) and a rival's, both scaled to the sum `total`.

    q (K, K): of network k's ||z||^2, in client j's dimensions, all networks on the same images;
    p (K,): the weights in the average. The rival is sum_k p_k^2 q_kj: were the networks' parts at
    right angles, their squares would add up.
    """
    q, p = np.asarray(q), np.asarray(p)
    law, rival = (p @ np.sqrt(q)) ** 2, p**2 @ q
    return law * total / law.sum(), rival * total / rival.sum()


def read(path):
    """The record's lines; ValueError for another file."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if not all("variant" in line for line in lines):
        raise ValueError(f"{path} is not a record of extras/separation.py")
    return lines


def compare(lines):
    """A frame with a line for each average, of p as trained or equal: measured shares, predictions.

    Runs whose clients have one set of dimensions in common are left out: nothing tells them apart.
    """
    found = []
    frame = pd.DataFrame([line for line in lines if "shares" in line])
    for (row, seed, r, epochs), group in frame.groupby(
        ["row", "seed", "round", "epochs"], sort=False
    ):
        by_variant = group.set_index("variant")
        trained = by_variant["weights"]["average"]
        weights = {"average": trained, "average-equal": [1 / len(trained)] * len(trained)}
        for variant, p in weights.items():
            measured = np.mean(by_variant["shares"][variant], axis=0)  # over the clients' images
            if measured.sum() < 1.01:
                law, rival = predict(by_variant["shares"]["same-images"], p, measured.sum())
                found.append([row, seed, r, epochs, variant, measured, law, rival])
    names = ["row", "seed", "round", "epochs", "variant", "measured", "law", "rival"]
    return pd.DataFrame(found, columns=names)


def markdown(frame, index, columns, key, digits, base=None):
    """A table of a value: mean ± std over the seeds, a line and a column as index and columns say.

    base: a column; the others are then the mean difference to it, with its 95 % interval.
    """
    values = frame.pivot_table(key, [*index, "seed"], columns, sort=False)
    names = [", ".join(map(str, np.atleast_1d(name))) for name in values]
    lines = [[", ".join(index), *names], ["---"] * (1 + len(names))]
    for line, group in values.groupby(level=index, sort=False):
        cells = [", ".join(map(str, np.atleast_1d(line)))]
        for name in values:
            if base and name != base:
                cells.append(cell(list((group[name] - group[base]).dropna()), digits, True))
            else:
                text = cell(list(group[name].dropna()), digits, False)
                cells.append(text.split(" ±")[0] if base else text)
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def law_table(lines):
    """By how many points, in the mean over the clients, the law and its rival are off."""
    parts = []
    for name in ("law", "rival"):
        frame = compare(lines)
        off = [np.abs(one - other).mean() for one, other in zip(frame[name], frame["measured"])]
        label = frame["variant"].map({"average": "", "average-equal": ", equal weights"})
        parts.append(frame.assign(row=frame["row"] + label, points=100 * np.array(off), by=name))
    return markdown(pd.concat(parts), ["row"], ["round", "by"], "points", 2)


def tables(lines):
    """The record's lines -> {name: Markdown}, of runs of one local epoch a round."""
    lines = [line for line in lines if line["epochs"] == 1 and line["space"] == "z"]
    frame = pd.DataFrame(lines)
    parts = frame[frame["variant"].isin(PARTS)]
    parts = parts.assign(part=parts["variant"].map(PARTS), own=100 * parts["own_share"])
    last = frame[frame["round"] == frame["round"].max()]
    last = last[last["variant"].isin(["own", "same-images", "average", "average-recalibrated"])]
    return {
        "swap": markdown(parts, ["row", "round"], "part", "own", 1),
        "law": law_table(lines),
        "apart": markdown(last, ["round", "variant"], "row", "inter", 3, last["row"].iloc[0]),
    }


def renew(page):
    """A page with the tables between `<!-- separation NAME: FILE -->` and `<!-- end -->` anew."""

    def fill(block):
        made = tables(read(ROOT / block[3]))[block[2]]
        return f"{block[1]}\n\n{made}\n\n<!-- end -->"

    return re.sub(r"(<!-- separation (\w+): (\S+) -->).*?<!-- end -->", fill, page, flags=re.S)


def main(argv=None):
    """A record -> its tables, printed; a page -> the same with its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    parser.add_argument("path", type=Path, help="a record of extras/separation.py, or PAGE.md")
    path = parser.parse_args(argv).path
    try:
        if path.suffix == ".md":
            path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            print("\n\n".join(tables(read(path)).values()))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
