"""README.md, RESULTS.md and SPEED.md tell the truth: code, flags, example, files, tables, links."""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent / "extras"))

import baselines
import bench
import figures
import separation
import study

import eval as evaluation
import model
import train
from model import SSDNet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
RESULTS = (ROOT / "extras/RESULTS.md").read_text()
SPEED = (ROOT / "extras/SPEED.md").read_text()
COMMANDS = re.findall(r"python ((?:extras/)?\w+\.py -?[^#`\n]*)", README + RESULTS + SPEED)
DEMONSTRATIONS = {"losses.py", "model.py", "data.py", "federated.py"}
SCRIPTS = {
    "train.py": train,
    "mine.py": train,  # the README's example
    "eval.py": evaluation,
    "extras/baselines.py": baselines,
    "extras/bench.py": bench,
    "extras/figures.py": figures,
    "extras/separation.py": separation,
    "extras/study.py": study,
}


class Parsed(Exception):
    pass


def block(words):
    """The README's Python block that has these words."""
    (found,) = (text for text in BLOCKS if words in text)
    return found


def test_the_losses_are_those_of_the_file():
    """Every line beside a formula stands in losses.py; its input checks are left out."""
    source = [line.split("  #")[0].strip() for line in (ROOT / "losses.py").open()]
    method = README[README.index("## The method") : README.index("## Results")]
    blocks = re.findall(r"```python\n(.*?)```", method, re.S)
    lines = [line.split("  #")[0].strip() for text in blocks for line in text.splitlines()]
    assert len(blocks) == 3 and len(lines) >= 8
    assert [line for line in lines if line not in source] == []


def test_the_block_of_the_first_screen_runs():
    names = {}
    exec(block("loss.backward()"), names)
    assert sorted(names["terms"]) == ["align", "distill", "dsr", "uniform"]


def test_the_encoder_is_torchvisions_as_the_readme_loads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/NAME").mkdir(parents=True)
    content = {"config": {"width": 64, "projector": True}, "split": [], "history": []}
    torch.save({**content, "model": SSDNet().state_dict()}, "runs/NAME/last.pt")
    (line,) = re.findall(r"`(model\.load_checkpoint.*?)`", README)
    encoder, net = eval(line, {"model": model}), torchvision.models.resnet18()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = net.fc = torch.nn.Identity()
    net.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(net.eval()(x), encoder(x), atol=1e-6)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_has_flags_that_exist(command, monkeypatch, tmp_path):
    """Each script is run until it has parsed its flags; study.py until it has planned its rows."""

    def stop(*_):
        raise Parsed

    script, *flags = shlex.split(command)
    if script in DEMONSTRATIONS:
        assert not flags  # a demonstration
        return
    monkeypatch.setattr(sys, "argv", [script, *flags])
    if "--help" in flags:
        assert flags == ["--help"]
    elif script == "mine.py":
        train.build_parser({**train.METHODS, "mine": {}}).parse_args(flags)
    elif SCRIPTS[script] in (train, baselines):
        SCRIPTS[script].build_parser().parse_args(flags)
    elif script == "extras/study.py":
        monkeypatch.setattr(study, "train_one", stop)
        monkeypatch.setattr(study, "renew", stop)
        (tmp_path / "extras").symlink_to(ROOT / "extras")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Parsed):
            study.main()
    else:
        parse = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(
            argparse.ArgumentParser,
            "parse_args",
            lambda self, argv=None: stop(parse(self, argv)),
        )
        with pytest.raises(Parsed):
            SCRIPTS[script].main()


def test_the_example_of_a_new_method_trains(tmp_path):
    """As a reader would: a file of one's own beside the project, train.py's flags."""
    (tmp_path / "mine.py").write_text(block("mine.py"))
    flags = "--dataset patterns --width 2 --limit 90 --clients 3 --alpha 1 --batch-size 16".split()
    flags += "--rounds 2 --local-epochs 1 --lr 0.01 --device cpu --out runs/mine".split()
    flags += ["--method", "mine"]
    assert "`python mine.py --method mine --dataset DIR`" in README
    done = subprocess.run(
        [sys.executable, "mine.py", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "round   2/2" in done.stdout and "  spread 0." in done.stdout
    assert len(block("mine.py").splitlines()) <= 30 and (tmp_path / "runs/mine/last.pt").exists()


def scores(name):
    """{row: {seed: scores}} of a study's record on its own data set."""
    return study.read((ROOT / f"assets/{name}.jsonl").open())[None]


def compare(row, base, names, heading):
    """Paired differences of two rows in a column of study.py, one a seed."""
    key, factor, _ = study.COLUMNS[heading]
    runs = study.differences(list(map(scores, names)), base)[row].values()
    return [factor * run[key] for run in runs]


def test_the_tables_of_results_are_those_of_their_records():
    """assets/*.jsonl are study.py's scores.jsonl, but for those of other scripts. All are shown."""
    marks = re.findall(r"<!-- .*\.jsonl -->", RESULTS)
    shown = set(re.findall(r"assets/(\S+\.jsonl)", " ".join(marks)))
    records = {file.name for file in (ROOT / "assets").glob("*.jsonl")}
    others = {name for name in records if name.startswith("first_run")}
    assert len(shown) > 9 and shown == records - others
    assert study.renew(RESULTS) == RESULTS, "python extras/study.py extras/RESULTS.md"
    assert len(RESULTS.encode()) <= 36 * 1024


def test_the_verdicts_are_those_of_the_intervals():
    """Claim: sign in the paper, what is compared in which column, records of the two scales."""
    lp, silo, regime = "LP %", ["silo"], ["regime", "regime-cpu"]
    no_projector = ("dsr --no-projector", "fedalignuniform --no-projector")
    ssd, small = ("ssd", "fedalignuniform"), ["ablation"]
    claims = {
        "SSD raises LP, K = 10": (1, *ssd, lp, regime, small),
        "SSD raises LP, K = 50": (1, *ssd, lp, [], ["device"]),
        "SSD raises fine-tuning on 1 % of the labels": (1, *ssd, "FT 1 %", [], silo),
        "SSD raises fine-tuning on 10 % of the labels": (1, *ssd, "FT 10 %", [], silo),
        "DSR alone raises LP": (1, "dsr", ssd[1], lp, regime, small),
        "distillation alone lowers LP": (-1, "pd", ssd[1], lp, regime, small),
        "hard separation lowers LP": (-1, "hsd", ssd[1], lp, regime, small),
        "DSR without projector raises LP": (1, *no_projector, lp, ["regime-projector"], []),
        "SSD makes `z` more uniform": (1, *ssd, "−L_uniform z", regime, small),
        "SSD aligns `z` better": (-1, *ssd, "alignment z", regime, small),
        "distillation carries DSR's uniformity into `h`": (
            *(1, "ssd", "dsr", "−L_uniform h", regime, small),
        ),
    }
    table = RESULTS[RESULTS.index("## Verdicts") : RESULTS.index("## How to read")]
    told = {line.split(" | ")[0][2:]: line for line in table.splitlines() if line[:2] == "| "}
    assert list(told)[1:] == list(claims)
    for claim, (sign, row, base, heading, *scales) in claims.items():
        verdicts = []
        for names in scales:
            middle, half = study.interval(compare(row, base, names, heading)) if names else (0, 0)
            verdict = "same sign" if middle * sign > 0 else "opposite sign"
            verdict = "cannot tell" if abs(middle) < half else verdict
            verdicts.append(verdict if names else "not tested")
        assert told[claim].endswith(f" | {' | '.join(verdicts)} |"), (claim, verdicts)


def test_the_findings_are_those_of_the_intervals():
    """Row, base, records, columns, signs: 0 where the interval covers zero."""
    base, r, four, silo = "fedalignuniform", ["regime", "regime-cpu"], ["ablation"], ["silo"]
    lp, h, z, align, rank = "LP %", "−L_uniform h", "−L_uniform z", "alignment z", "eff. rank h"
    for row, other, names, told in (
        ("ssd", base, r, {lp: 0, h: -1, z: -1, align: -1, rank: -1}),
        ("ssd --gamma 0.2", base, r, {lp: 0, h: -1, z: 0, align: 1}),
        ("ssd --gamma 0.05", base, r, {lp: 0, h: -1, z: 0, align: 0}),
        ("dsr", base, r, {lp: -1, h: 1}),
        ("pd", base, r, {lp: 0, h: -1}),
        ("ssd", base, four, {lp: 0, h: 1, align: -1, rank: -1}),
        ("dsr", base, four, {lp: 0, h: 1, "kNN %": -1, rank: -1}),
        ("pd", base, four, {lp: 0, "kNN %": -1, rank: -1}),
        ("hsd", base, four, {lp: 0, rank: -1}),
        ("dsr-literal", "dsr", ["choices-dsr"], {lp: -1}),
        ("dsr-authors", "dsr", ["choices-dsr"], {lp: 0, h: -1}),
        ("dsr --gamma 0.1", "dsr", ["choices-dsr"], {lp: 0, h: -1}),
        ("ssd-reverse", "ssd", ["choices-ssd"], {lp: 0}),
        ("ssd-half", "ssd", ["choices-ssd"], {lp: 0, h: -1}),
        ("ssd-into-h", "ssd", ["choices-ssd"], {lp: 0}),
        ("ssd-authors", "ssd", ["choices-ssd"], {lp: 0, h: -1}),
        ("ssd-cosine", "ssd", ["choices-ssd"], {lp: 0, z: 1}),
        *((row, base, silo, {lp: -1, "FT 1 %": 0, "FT 10 %": 0}) for row in ("fedx", "ldawa")),
        *((row, base, silo, {lp: 0, "FT 1 %": 0, "FT 10 %": 0}) for row in ("feddecorr", "fedu2")),
        ("local", base, [*silo, "local"], {lp: -1}),
        *((row, base, ["device"], {lp: 0}) for row in ("fedx", "ldawa", "feddecorr", "fedu2")),
        ("ssd", base, ["device"], {lp: 0, z: -1}),
    ):
        for heading, sign in told.items():
            middle, half = study.interval(compare(row, other, names, heading))
            found = 0 if abs(middle) < half else 1 if middle > 0 else -1
            assert found == sign, (row, names, heading)


def test_the_noise_floor_is_that_of_repeats():
    headings = study.PAIRED[:1] + study.PAIRED[3:]
    one, two = scores("regime"), scores("regime-cpu")
    pairs = [(one[row][s], two[row][s]) for row in one for s in one[row] if s in two.get(row, {})]
    assert len(pairs) == 9
    rms, largest = "| root mean square |", "| largest |"
    for key, _, digits in map(study.COLUMNS.get, headings):
        off = [a[key] - b[key] for a, b in pairs]
        digits = min(digits, 3)
        rms += f" {(sum(d * d for d in off) / 9) ** 0.5:.{digits}f} |"
        largest += f" {max(map(abs, off)):.{digits}f} |"
    assert f"| | {' | '.join(headings)} |" in RESULTS and rms in RESULTS and largest in RESULTS
    assert f"by {rms.split(' | ')[1]} (rms of 9 pairs)" in " ".join(README.split())


def lines(name):
    """Of a record in assets/."""
    return map(json.loads, (ROOT / f"assets/{name}.jsonl").open())


def is_of(line, row, variant, r, space="z"):
    wanted = {"row": row, "variant": variant, "round": r, "space": space}
    return wanted.items() <= line.items()


def lean(line):
    """How much of z lies in each client's dimensions: of its own network's, or of one network's."""
    shares = np.array(line["shares"])
    return shares.diagonal() if line["variant"] == "own" else shares.mean(0)


def correlation(line):
    return np.corrcoef(line["weights"], lean(line))[0, 1]


def controls(row, variant, r, key="inter", space="z"):
    """{seed: value} of assets/controls.jsonl."""
    found = [line for line in lines("controls") if is_of(line, row, variant, r, space)]
    apart = {line["seed"]: line["inter"] - line["intra"] for line in found}
    return apart if key == "apart" else {line["seed"]: line[key] for line in found}


def test_what_results_and_the_readme_say_of_the_controls():
    page, base, new = " ".join(RESULTS.split()), "fedalignuniform", "average-recalibrated"
    ssd, common, rounds, readme = "ssd", "ssd-common", (2, 5, 20), " ".join(README.split())

    def shares(row, variant):
        means = [controls(row, variant, r, "own_share").values() for r in rounds]
        return [100 * sum(values) / len(values) for values in means]

    def told(row, other, *which):
        one, two = controls(row, *which), controls(other, *which)
        return study.cell([one[seed] - two[seed] for seed in one if seed in two], 3, True)

    def those(row, variant, *rounds):
        found = [line for r in rounds for line in lines("controls") if is_of(line, row, variant, r)]
        assert len(found) == 3 * len(rounds)
        return found

    for words, row, variant in (
        ("SSD's local networks put {} of `z`", ssd, "own"),
        ("of test images ({})", ssd, "same-images"),
        ("mean own share near chance, the average {}, a point of it the images'.", ssd, "average"),
        ("keeps the whole lean, {}.", common, "average"),
    ):
        assert words.format("{:.0f}, {:.0f} and {:.0f} %".format(*shares(row, variant))) in page
    for row, variant in ((base, "own"), (base, "average"), (ssd, "average"), (ssd, "one-network")):
        near = shares(row, variant)[: 2 if (row, variant) == (ssd, "average") else 3]
        assert max(abs(share - 9.375) for share in near) < 1  # 12 of 128
    more = [np.diagonal(x["shares"]).mean() - lean(x).mean() for x in those(ssd, "average", 20)]
    assert 0.004 < min(more) and max(more) < 0.011  # of the client's images than of all images
    leans = [100 * lean(line) for line in those(ssd, "own", 20)]
    ends = f"{np.min(leans):.0f} to {np.max(leans):.0f}"
    assert f"puts {shares(ssd, 'own')[2]:.0f} % of ||z||^2 there ({ends}; orange)" in readme
    assert "the more images the client has" in readme
    found = those(ssd, "average", *rounds)
    assert min(map(correlation, those(ssd, "average", 5, 20))) > 0.97
    alike = max(100 * np.ptp(line["shares"], 0).max() for line in found)
    assert f"treats all images alike, within {alike:.1f} points" in page
    for row, variant, when in (
        (ssd, "average", [2]),
        (ssd, "average", [5]),
        (ssd, "average", [20]),
        (ssd, "average-equal", [20]),
        ("ssd-gamma-0.2", "average", rounds),
        (base, "average", rounds),
    ):
        values = sorted(map(correlation, those(row, variant, *when)))
        assert f" {values[0]:.2f} to {values[-1]:.2f}".replace("-", "−") in page
    for words, variant, few in (
        ("has {} % of `z`, the three", "average", False),
        ("fewest (2, 2, 3 % each) have {} %", "average", True),
        ("With equal weights it is {} and", "average-equal", False),
        ("and {} %, the correlation", "average-equal", True),
        ("lean less ({} %)", "own", True),
    ):
        found = those(ssd, variant, 20)
        orders = [np.argsort(line["weights"]) for line in found]
        ends = [order[:3] if few else order[-1:] for order in orders]
        means = [100 * lean(line)[end].mean() for line, end in zip(found, ends)]
        assert words.format(", ".join(f"{mean:.0f}" for mean in means)) in page
    more = [f"{told(row, base, new, 2, 'apart')} more" for row in (ssd, common)]
    apart = sum(controls(base, new, 2, "apart").values()) / 3
    assert f"is {apart:.3f} for the baseline, {more[0]} for SSD and {more[1]} with a common" in page
    assert f"In `z` it is {told(ssd, base, 'average', 2)}, and with" in page
    low = [told("ssd-gamma-0.2", base, new, r) for r in rounds]
    assert "is after 2 rounds {}, after 5 {}, after 20 {}, then within".format(*low) in page
    for row, words in ((ssd, "it takes {} from"), (base, "of SSD's `z`, {} from")):
        own, average = (controls(row, variant, 20) for variant in ("own", "average"))
        lost = study.cell([own[seed] - average[seed] for seed in own], 3, True).replace("+", "")
        assert len(own) == 3 and words.format(lost) in page
    assert f"rounds by {told(ssd, base, 'average-equal', 20, 'total')} against the" in page
    for space, r in itertools.product("hz", rounds):
        which = new, r, "total", space
        values = controls(base, *which).values()
        cells = [f"{sum(values) / 3:.3f}"]
        cells += [told(*pair, *which) for pair in ((ssd, base), (common, base), (ssd, common))]
        assert len(values) == 3 and f"| {space}, round {r} | {' | '.join(cells)} |" in page
        one, two = controls(ssd, *which), controls(common, *which)
        middle, half = study.interval([one[seed] - two[seed] for seed in one])
        assert abs(middle) > half and (middle < 0) == (space == "h")  # zero left out


def test_the_forest_is_that_of_the_records_and_of_the_papers_tables():
    shown = (ROOT / "assets/forest.svg").read_text()
    paper = dict(re.findall(r"^\| ([^|]+) \| (\d\d\.\d\d) ", RESULTS, re.M))
    device = re.findall(
        r"^\| (\w\S+) (?:\| [\d.]+ ){3}\| (\d\d\.\d\d) (?:\|[^|]+){2}\|$", RESULTS, re.M
    )
    device, names = dict(device), {"pd": "+ PD", "dsr": "+ DSR", "ldawa": "L-DAWA"}
    names["dsr --no-projector"] = "+ DSR, no projector"
    names |= {name.lower(): name for name in paper | device if name.isalnum()}
    for title, (files, papers) in figures.FOREST.items():
        base = next(iter(scores(files[0])))
        for row, value in papers.items():
            values = compare(row, base, files, "LP %")
            assert f">{study.cell(values, 1, True)}, n = {len(values)}<" in shown, row
            if value is not None:
                printed = device if "50 clients" in title else paper
                baseline = "FedAlignUniform" + ", no projector" * ("projector" in title)
                minus = float(printed[names[row]]) - float(printed[baseline])
                assert value == pytest.approx(minus), (title, row)


def test_what_results_says_beside_its_tables():
    page, regime, untrained = " ".join(RESULTS.split()), scores("regime"), "ssd --rounds 0"
    lp = [run["linear_probe"] for run in regime[untrained].values()]
    assert f"({sum(lp) / len(lp):.2f}, n = {len(lp)})" in page
    printed, two = scores("choices-dsr")["dsr-literal"], scores("silo")[untrained]
    assert len(two) == 2 and all(printed[s]["linear_probe"] < two[s]["linear_probe"] for s in two)
    (all_here,) = scores("regime-cpu")["fedalignuniform --clients 1"].values()
    assert f"have LP {all_here['linear_probe']:.2f}" in page
    ahead = {}
    for key in ("uniformity_h_rounds", "uniformity_z_rounds"):
        pairs = [(regime["ssd"][s][key], regime["fedalignuniform"][s][key]) for s in (0, 1, 2)]
        ahead[key] = [{r for r, (a, b) in enumerate(zip(*p), 1) if a < b} for p in pairs]
    h, z = ahead.values()
    assert set.intersection(*h) == {2, 3, 4, 5} and max(set.union(*h)) == 6
    assert set.intersection(*z) == {4} and max(set.union(*z)) == 4
    assert "in rounds 2 to 5 of every seed on the H200, and in none from round 7 on" in page


def test_what_results_says_of_the_papers_setting():
    page, base, low = " ".join(RESULTS.split()), "fedalignuniform", "ssd --gamma 0.05"
    runs = {row: seeds[0] for row, seeds in scores("paper").items()}
    minus = {
        (row, key): [a - b for a, b in zip(runs[row][f"{key}_rounds"], runs[base][f"{key}_rounds"])]
        for row, key in itertools.product(("ssd", low), study.CURVES)
    }
    assert {len(values) for values in minus.values()} == {13}
    assert all(value > 0 for row in ("ssd", low) for value in minus[row, "uniformity_h"][1:])
    below, above = (sorted(map(abs, minus[row, "uniformity_z"][4:])) for row in ("ssd", low))
    assert min(minus["ssd", "uniformity_z"][4:]) > 0 > max(minus[low, "uniformity_z"][4:])
    assert f"`z` is {below[0]:.3f} to {below[-1]:.3f} below the baseline's" in page
    assert f"with γ = 0.05 {above[0]:.3f} to {above[-1]:.3f} above" in page
    knn = [runs[row]["knn_rounds"][-1] for row in ("ssd", low, base)]
    assert "kNN is {} and {} % at the end, the baseline's {}.".format(*knn) in page
    assert f"LP is {runs[base]['linear_probe']:.2f} for the baseline, the paper's 80.84" in page
    assert minus["ssd", "align"][4] > 0 > max(minus["ssd", "align"][5:])
    wide = {row: scores("wide")[row][0] for row in ("ssd", base)}
    log, scored = ([wide[row][key] for row in wide] for key in ("align_rounds", "alignment_z"))
    assert log[0][-1] < log[1][-1] and scored[0] > scored[1]
    found = [line for line in lines("controls") if line["epochs"] == 5 and line["row"] != base]
    own, same, average = (
        next(line for line in found if is_of(line, "ssd-gamma-0.05", variant, 13))
        for variant in ("own", "same-images", "average")
    )
    told = f"have {100 * own['own_share']:.0f} % of `z` in own dimensions, of test images "
    told += f"{100 * same['own_share']:.0f} %, small clients' below chance; in the average the"
    small = np.argsort(own["weights"])[:3]
    assert max(lean(own)[small]) < own["chance"]
    most = np.argmax(average["weights"])
    part, share = 100 * average["weights"][most], 100 * lean(average)[most]
    assert f"{told} client with {part:.0f} % of the images has {share:.0f} %." in page


def test_what_results_says_of_the_first_run():
    runs = {}
    for line in map(json.loads, (ROOT / "assets/first_run.jsonl").open()):
        runs.setdefault(line["method"], {}).setdefault(line["seed"], []).append(line["knn"])
    ssd, base = (
        study.cell([run[8] for run in runs[m].values()], 1, False) for m in sorted(runs)[::-1]
    )
    page = " ".join(RESULTS.split())
    assert f"After 8 rounds SSD's kNN is {ssd} % (mean ± std), the baseline's {base} %." in page
    assert f"67.5 % instead of {runs['ssd'][0][8]:.1f} %" in page and "kNN 67.5 %" in README


def test_the_readmes_claims_are_those_of_their_runs():
    """A claim's number: row, what is subtracted, column, digits, the paper's sign."""
    base, lp = "fedalignuniform", ("LP %", 2)
    for number, (row, other, (heading, digits), sign) in {
        1: ("ssd", base, lp, 1),
        2: ("dsr", base, lp, 1),
        3: ("pd", base, lp, -1),
        4: ("hsd", base, lp, -1),
        5: ("ssd", base, ("−L_uniform z", 3), 1),
        6: ("ssd", base, ("alignment z", 3), -1),
        7: ("ssd", "dsr", ("−L_uniform h", 3), 1),
    }.items():
        values = compare(row, other, ["regime", "regime-cpu"], heading)
        middle, half = study.interval(values)
        verdict = "same sign" if middle * sign > 0 else "opposite"
        verdict = "cannot tell" if abs(middle) < half else verdict
        (line,) = re.findall(rf"^\| {number} .*", README, re.M)
        cell = study.cell(values, digits, True)
        assert line.endswith(f" | {cell}, {len(values)} | {verdict} |"), (cell, verdict)


def prose(page):
    """A page's lines, without what stands in ``` blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.S | re.M).splitlines()


@pytest.mark.parametrize("page, columns", [(README, 6), (RESULTS, 8), (SPEED, 8)])
def test_tables_are_narrow_and_lines_short(page, columns):
    lines = prose(page)
    tables = [line.replace(r"\|", "") for line in lines if line.startswith("|")]
    assert len(tables) > 8 and max(line.count("|") - 1 for line in tables) <= columns
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "<img", "<!--")))


def test_the_readme_is_read_to_the_end():
    assert len(README.encode()) <= 10 * 1024 and len(README.splitlines()) <= 180


@pytest.mark.parametrize(
    "name, needs, shown",
    [
        ("losses", [], "step 5: inter-client -L_uniform 1.787"),
        ("federated", [], "round 6: w = 2.9531"),  # 3 (1 - 2^-6)
        ("model", [], "encoder 11.17 M, projector 2.10 M"),
        ("data", [], "all" + 10 * "      500" + "    5000"),
        ("eval", ["data", "model"], None),  # a script, no demonstration
    ],
)
def test_a_copied_file_works_alone_its_example_and_its_demonstration(name, needs, shown, tmp_path):
    """In a folder with nothing but what it says that it needs, and without a warning."""
    for file in (name, *needs):
        (tmp_path / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
    code = f"import doctest, runpy, {name}; print(doctest.testmod({name}))"
    code += f"; runpy.run_path('{name}.py', run_name='__main__')" * bool(shown)
    strict = [f"-Werror::{kind}Warning" for kind in ("Deprecation", "Future", "User")]
    command = [sys.executable, *strict, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert re.match(r"TestResults\(failed=0, attempted=[3-9]", done.stdout), done
    assert done.returncode == 0 and done.stderr == "", done
    if shown:
        assert f"`python {name}.py`" in README
        assert shown in done.stdout and len(done.stdout.splitlines()) >= 4


def anchors(page):
    """What its headings are called in links: lower case, hyphens for spaces, no other signs."""
    titles = [line.lstrip("#").strip() for line in prose(page) if re.match("#+ ", line)]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "extras/RESULTS.md", "extras/SPEED.md"])
def test_every_relative_link_and_anchor_resolves(name):
    text = "\n".join(prose((ROOT / name).read_text()))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    links = [link for link in links if "://" not in link]
    assert len(links) > 2
    for link in links:
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link
