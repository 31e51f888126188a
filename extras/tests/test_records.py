"""extras/RESULTS.md and README.md say what the records in assets/ hold; claims.py by hand."""

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import baselines
import claims
import law
import pytest
import study
import tables
import variants

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "extras/RESULTS.md").read_text()
SPEED = (ROOT / "extras/SPEED.md").read_text()
COMMANDS = re.findall(r"python (extras/\w+\.py -?[^#`\n]*)", README + RESULTS + SPEED)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_has_flags_that_exist(command, monkeypatch, tmp_path):
    """Each script is run until it has parsed its flags; study.py until it has planned its rows."""

    def stop(*_):
        raise Parsed

    script, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    scripts = {"baselines": baselines, "variants": variants}
    name = Path(script).stem
    if name == "study":
        monkeypatch.setattr(study, "train_one", stop)
        monkeypatch.setattr(claims, "renew", stop)
        (tmp_path / "extras").symlink_to(ROOT / "extras")
        (tmp_path / "README.md").symlink_to(ROOT / "README.md")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Parsed):
            study.main()
    elif name in ("baselines", "variants"):
        scripts[name].build_parser().parse_args(flags)
    else:
        assert (ROOT / script).exists()


def scores(name):
    """{row: {seed: scores}} of a study's record on its own data set."""
    return tables.group(tables.read(ROOT / f"assets/{name}.jsonl"))[None]


def compare(row, base, names, heading):
    """Paired differences of two rows in a column, one a seed."""
    key, factor, _ = tables.COLUMNS[heading]
    runs = tables.differences(list(map(scores, names)), base)[row].values()
    return [factor * run[key] for run in runs]


def test_the_tables_of_the_pages_are_those_of_their_records():
    marks = re.findall(r"<!-- .*\.jsonl -->", RESULTS)
    shown = set(re.findall(r"assets/(\S+\.jsonl)", " ".join(marks)))
    records = {file.name for file in (ROOT / "assets").glob("*.jsonl")}
    assert len(shown) > 9 and shown == {name for name in records if "first_run" not in name}
    assert claims.renew(RESULTS) == RESULTS, "python extras/study.py extras/RESULTS.md"
    assert law.renew(RESULTS) == RESULTS, "python extras/law.py extras/RESULTS.md"
    assert claims.renew(README) == README, "python extras/study.py README.md"


def test_a_verdict_needs_an_interval_without_zero_and_a_spread_above_the_noise():
    assert claims.verdict([1.0, 1.1, 0.9], 1, floor=0.0) == "same sign"
    assert claims.verdict([1.0, 1.1, 0.9], -1, floor=0.0) == "opposite"
    assert claims.verdict([1.0, 1.1, 0.9], 1, floor=0.5) == "cannot tell"  # 4.3 x 0.5 / 1.7 = 1.2
    assert claims.verdict([-1.0, 2.0, 0.5], 1, floor=0.0) == "cannot tell"


def test_p_values_and_holms_correction_by_hand():
    assert claims.p_value([1, 2, 3], 0.0) == pytest.approx(0.0742, abs=1e-4)  # t = 3.46, 2 freedoms
    assert claims.p_value([0.0, 2.0], 0.0) == pytest.approx(0.5, abs=1e-4)  # t = 1, Cauchy
    assert claims.holm([0.001, 0.03, 0.04]) == 1 and claims.holm([0.04, 0.001, 0.02]) == 3


def test_two_claims_that_are_one_have_one_verdict(monkeypatch):
    values = {"a": [1.0, 1.1, 0.9], "b": [-1.0, -1.1, -0.9], "c": [-1.0, 2.0, 0.5]}
    monkeypatch.setattr(claims, "compare", lambda claim, form: values[claim["column"]])
    monkeypatch.setattr(claims, "noise_floor", lambda column: (0.0, 9))

    def judge(one, two):
        both = [{"number": 1, "column": one, "sign": 1, "with": 2}]
        both.append({"number": 2, "column": two, "sign": 1, "judged_with": 1})
        return [claims.judge(claim, "printed", both) for claim in both]

    assert judge("a", "a") == ["same sign", "with 1"]
    assert judge("a", "b") == ["opposite", "with 1"]
    assert judge("a", "c") == ["cannot tell", "with 1"]


def test_the_findings_are_those_of_the_intervals():
    """Row, base, records, columns, signs: 0 where the interval covers zero."""
    base, r, four, silo = "fedalignuniform", ["regime", "regime-cpu"], ["ablation"], ["silo"]
    lp, h, z, align = "LP %", "−L_uniform h", "−L_uniform z", "alignment z"
    for row, other, names, told in (
        ("ssd", base, r, {lp: 0, h: -1, z: -1, align: -1}),
        ("ssd --gamma 0.2", base, r, {lp: 0, h: -1, z: 0, align: 1}),
        ("ssd --gamma 0.05", base, r, {lp: 0, h: -1, z: 0, align: 0}),
        ("dsr", base, r, {lp: -1, h: 1}),
        ("pd", base, r, {lp: 0, h: -1}),
        ("ssd", base, four, {lp: 0, h: 1, align: -1}),
        ("dsr", base, four, {lp: 0, h: 1, "kNN %": -1}),
        ("pd", base, four, {lp: 0, "kNN %": -1}),
        ("hsd", base, four, {lp: 0}),
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
        *(
            (row, base, ["cross-device"], {lp: 0})
            for row in ("fedx", "ldawa", "feddecorr", "fedu2")
        ),
        ("ssd", base, ["cross-device"], {lp: 0, z: -1}),
    ):
        for heading, sign in told.items():
            middle, half = tables.interval(compare(row, other, names, heading))
            found = 0 if abs(middle) < half else 1 if middle > 0 else -1
            assert found == sign, (row, names, heading)


def test_the_noise_floor_is_that_of_repeats():
    headings = tables.PAIRED[:1] + tables.PAIRED[3:]
    one, two = scores("regime"), scores("regime-cpu")
    pairs = [(one[row][s], two[row][s]) for row in one for s in one[row] if s in two.get(row, {})]
    assert len(pairs) == 9
    rms, largest = "| root mean square |", "| largest |"
    for key, _, digits in map(tables.COLUMNS.get, headings):
        off = [a[key] - b[key] for a, b in pairs]
        digits = min(digits, 3)
        rms += f" {(sum(d * d for d in off) / 9) ** 0.5:.{digits}f} |"
        largest += f" {max(map(abs, off)):.{digits}f} |"
    assert f"| | {' | '.join(headings)} |" in RESULTS and rms in RESULTS and largest in RESULTS
    told = f"by {rms.split(' | ')[1]} between two machines (rms of 9 pairs)"
    assert told in " ".join(README.split())


def test_the_forest_and_the_claims_are_those_of_the_records_and_of_the_papers_tables():
    shown = (ROOT / "assets/forest.svg").read_text()
    ten = dict(re.findall(r"^\| ([^|]+) \| (\d\d\.\d\d) ", RESULTS, re.M))
    pattern = r"^\| (\w\S+) (?:\| [\d.]+ ){3}\| (\d\d\.\d\d) (?:\|[^|]+){2}\|$"
    fifty = dict(re.findall(pattern, RESULTS, re.M))
    names = {"ssd": "SSD", "pd": "+ PD", "dsr": "+ DSR", "hsd": "HSD"}
    names |= {"fedalignuniform": "FedAlignUniform", "dsr --no-projector": "+ DSR, no projector"}
    names["fedalignuniform --no-projector"] = "FedAlignUniform, no projector"
    for claim in claims.read_claims():
        values = claims.compare(claim, "printed")
        if claim["column"] == "LP %":
            assert f">{tables.cell(values, 1, True)}, n = {len(values)}<" in shown, claim
            printed = fifty if "K = 50" in claim["claim"] else ten
            row, base = names[claim["printed"]["row"]], names[claim["printed"]["base"]]
            minus = float(printed[row]) - float(printed[base])
            assert float(claim["paper"].replace("−", "-")) == pytest.approx(minus), claim


def test_what_results_says_beside_its_tables():
    page, regime, untrained = " ".join(RESULTS.split()), scores("regime"), "ssd --rounds 0"
    lp = [run["linear_probe"] for run in regime[untrained].values()]
    assert f"({sum(lp) / len(lp):.2f}, n = {len(lp)})" in page
    printed, two = scores("choices-dsr")["dsr-literal"], scores("silo")[untrained]
    assert len(two) == 2 and all(printed[s]["linear_probe"] < two[s]["linear_probe"] for s in two)
    (all_here,) = scores("regime-cpu")["fedalignuniform --clients 1"].values()
    assert f"have LP {all_here['linear_probe']:.2f}" in page
    key, ahead = "uniformity_h_rounds", []
    for seed in (0, 1, 2):
        rounds = zip(regime["ssd"][seed][key], regime["fedalignuniform"][seed][key])
        ahead.append({r for r, (ssd, base) in enumerate(rounds, 1) if ssd < base})
    assert set.intersection(*ahead) == {2, 3, 4, 5} and max(set.union(*ahead)) == 6
    assert "than the baseline's in rounds 2 to 5, and less from round 7 on" in page


def test_what_results_says_of_the_papers_setting():
    page, base, low = " ".join(RESULTS.split()), "fedalignuniform", "ssd --gamma 0.05"
    runs = {row: seeds[0] for row, seeds in scores("paper").items()}
    minus = {
        (row, key): [a - b for a, b in zip(runs[row][f"{key}_rounds"], runs[base][f"{key}_rounds"])]
        for row, key in itertools.product(("ssd", low), tables.CURVES)
    }
    assert {len(values) for values in minus.values()} == {13}
    assert all(value > 0 for row in ("ssd", low) for value in minus[row, "uniformity_h"][1:])
    below, above = (sorted(map(abs, minus[row, "uniformity_z"][4:])) for row in ("ssd", low))
    assert min(minus["ssd", "uniformity_z"][4:]) > 0 > max(minus[low, "uniformity_z"][4:])
    assert f"`z` is {below[0]:.3f} to {below[-1]:.3f} below the baseline's" in page
    assert f"with γ = 0.05 it is {above[0]:.3f} to {above[-1]:.3f} above" in page
    assert f"The baseline's LP is {runs[base]['linear_probe']:.2f}; the paper's is 80.84" in page
    knn = {row: run["knn_rounds"][-1] for row, run in runs.items()}
    assert max(knn["ssd"], knn[low]) <= knn[base]


def test_what_results_says_of_the_first_run():
    runs = {}
    for line in map(json.loads, (ROOT / "assets/first_run.jsonl").open()):
        runs.setdefault(line["method"], {}).setdefault(line["seed"], []).append(line["knn"])
    ssd, base = (
        tables.cell([run[8] for run in runs[m].values()], 1, False) for m in sorted(runs)[::-1]
    )
    page = " ".join(RESULTS.split())
    assert f"After 8 rounds SSD's kNN is {ssd} % (mean ± std), the baseline's {base} %." in page
