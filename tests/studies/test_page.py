"""Tables and charts of studies, and their page."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import study_samples
from page_checks import Outline, check_layout
from scipy import stats

from mtv_jax.cli.main import run_command
from mtv_jax.report.contrasts import (
  ArmMeasurements,
  Metric,
  compare_arms,
  correct_contrasts,
)
from mtv_jax.report.tables import contrast_table, differences_table
from mtv_jax.studies import page as study_page
from mtv_jax.studies import runner, scaling, statistics
from mtv_jax.studies.expand import ComparisonFamily

TOP1 = Metric("zero_shot/top1", chance=0.05)
RMSE = Metric("depth/rmse", unit="m", lower=True, chance=3.0)
OBJECTIVES = study_samples.OBJECTIVES
LADDER = [
  ("vl", OBJECTIVES[:1], 0.0),
  ("ssl", OBJECTIVES[:2], 0.05),
  ("all", OBJECTIVES, 0.2),
]


def measure(arms):
  """Measurements from lists of (top1, rmse), one pair a seed."""
  names = TOP1.name, RMSE.name
  return ArmMeasurements(
    {
      arm: {s: dict(zip(names, x, strict=True)) for s, x in enumerate(runs)}
      for arm, runs in arms.items()
    }
  )


DATA = measure(
  {
    "vl": [(0.20, 2.0), (0.22, 2.1), (0.21, 2.05), (0.2, 2.0), (0.22, 2.1)],
    "all": [(0.4, 1.5), (0.42, 1.9), (0.41, 2.2), (0.4, 1.8), (0.42, 1.9)],
  }
)


def compare(data, *metrics):
  """The arm `all` against `vl`, as one family."""
  rows = [compare_arms(data, metric, "all", "vl") for metric in metrics]
  return correct_contrasts(rows)


def test_values_are_means_with_t_intervals():
  head, top1, rmse = study_page.values_table(DATA, [TOP1, RMSE])
  assert head == ["metric", "vl", "all", "chance"]
  half = 1.25 * stats.t.ppf(0.975, 4) * stats.sem([20, 22, 21, 20, 22])
  assert top1[:2] == [
    "zero_shot/top1 (%)",
    f"21.0 [{21 - half:.1f}, {21 + half:.1f}]",
  ]
  assert top1[-1] == "5.0"
  assert rmse[0] == "depth/rmse (m) ↓" and rmse[-1] == "3.000"


def test_differences_have_verdicts():
  rows = compare(DATA, TOP1, RMSE)
  head, top1, rmse = differences_table(rows)
  assert head == ["metric", "all"]
  assert top1[1].endswith("]\nbetter")
  assert top1[1].startswith("+20.0 [+17.")
  assert rmse[1].startswith("−0.190 [−")
  assert rmse[1].endswith("\nnot distinguishable")
  table = contrast_table([(rows[0].name, rows[0])])
  row = dict(zip(*table, strict=True))
  assert row["comparison"] == "all − vl" and row["verdict"] == "better"
  assert row["covers"] == "seeds"
  assert row["seeds"] == "5" and float(row["p Holm"]) < 0.05
  # Outside of the family, and with few seeds, there is no verdict.
  rows = [compare_arms(DATA, RMSE, "all", "vl")]
  assert differences_table(rows)[1][1].endswith("]")
  few = measure({"vl": [(0.2, 2.0)] * 2, "all": [(0.4, 1.0), (0.5, 1.5)]})
  assert differences_table(compare(few, RMSE))[1][1] == "−0.750"


def test_table_of_correlations():
  ranks = [Metric(f"feature_rank/{name}", unit="") for name in ("a", "b")]
  cells = [(0.5, 7), (-0.25, 7), (1.0, 6)]
  keys = [(TOP1, ranks[0]), (TOP1, ranks[1]), (RMSE, ranks[1])]
  assert study_page.correlations_table(dict(zip(keys, cells, strict=True))) == [
    ["metric", "feature_rank/a", "feature_rank/b", "runs"],
    ["zero_shot/top1 (%)", "+0.50", "-0.25", "7"],
    ["depth/rmse (m) ↓", "–", "+1.00", "6"],
  ]


def test_charts_of_arms_name_differences():
  rows = compare(DATA, RMSE)
  (chart,) = study_page.draw_arms(DATA, [RMSE], rows)
  titles = re.findall(r"<title>((?:vl|all): [^<]*)</title>", chart.svg)
  assert titles[0].startswith("vl: 2.05 m, 1.972 to 2.128")
  assert ". all − vl: −0.190 [" in titles[1]
  assert chart.svg.count("class='seed'") == 10
  # One seed, and no standard errors: no interval.
  one = measure({"vl": [(0.2, 2.0)], "all": [(0.4, 1.0)]})
  rows = compare(one, RMSE)
  (chart,) = study_page.draw_arms(one, [RMSE], rows)
  assert "class='bar'" not in chart.svg and "class='seed'" not in chart.svg


def test_steps_are_compared_with_the_arm_before():
  levels = dict(a=0.1, b=0.3, c=0.6)
  data = measure({k: [(v, 1.0), (v + 0.01, 1.1)] for k, v in levels.items()})
  rows = statistics.compare(data, [TOP1], [("b", "a"), ("c", "b")], {})
  assert [(r.arm, r.baseline) for r in rows] == [("b", "a"), ("c", "b")]
  np.testing.assert_allclose([r.difference for r in rows], [0.2, 0.3])
  head = differences_table(rows)[0]
  assert head == ["metric", "b − a", "c − b"]


def test_synergy_matrix():
  arms = {"a": [(0.10, 2.0), (0.11, 2.1)], "b": [(0.20, 1.8), (0.21, 1.9)]}
  data = measure(arms | {"a+b": [(0.30, 1.5), (0.31, 1.6)]})
  synergies = statistics.find_synergies(data, [TOP1, RMSE], {})
  top1, rmse = study_page.draw_synergies(synergies)
  cells = re.findall(r"<title>([ab], [ab]): ([^<]*)</title>", top1.svg)
  values = dict(cells)
  assert values["a, a"] == values["b, b"] == "no value"
  # 30.5 over the better, 20.5; 25.5 above chance over 5.5 and 15.5.
  assert float(values["a, b"]) == pytest.approx(10)
  assert float(values["b, a"]) == pytest.approx(25.5 - 5.5 - 15.5)
  # Lower is better: the gain is positive.
  values = dict(re.findall(r"<title>([ab], [ab]): ([^<]*)</title>", rmse.svg))
  assert float(values["a, b"]) == pytest.approx(0.3)
  rows = study_page.synergy_rows(synergies)
  assert [name for name, _ in rows[:2]] == ["a+b − b", "a+b − sum of both"]


def test_scaling_curves_follow_their_fit():
  sizes, arms = {}, {}
  for model, parameters in (("s", 1e3), ("m", 1e4), ("l", 1e5)):
    for images in (1000, 4000, 16000):
      arm = f"{model}-{images}"
      error = 0.1 + 2 * images**-0.3 + 3 * parameters**-0.4
      arms[arm] = [(1 - error, error)]
      sizes[arm] = dict(model=model, images=images, parameters=parameters)
  data, metrics = measure(arms), [TOP1, RMSE]
  fits = scaling.fit_metrics(data, metrics, sizes)
  charts = scaling.draw_scaling(data, metrics, sizes, fits)
  assert [c.title for c in charts] == ["zero_shot/top1 (%)", "depth/rmse (m) ↓"]
  for chart in charts:
    dots = re.findall(r"cx='([\d.]+)' cy='([\d.]+)' r='2.5'><title>", chart.svg)
    assert len(dots) == 9
    curves = re.findall(r"class='line dashed' d='M([^']*)'", chart.svg)
    for k, curve in enumerate(curves):
      # The exact law: the fit begins and ends at the model's dots.
      ends = np.array([p.split() for p in curve.split("L")], float)
      own = np.array(dots[3 * k : 3 * k + 3], float)
      np.testing.assert_allclose(ends[[0, -1]], own[[0, -1]], atol=0.7)
    assert len(curves) == 3
  table = scaling.fits_table(fits)
  row = dict(zip(table[0], table[1], strict=True))
  assert float(row["exponent images"].split()[0]) == pytest.approx(0.3, rel=0.1)
  assert row["points"] == "9"
  (line,) = {x.partition(": ")[2] for x in scaling.describe_laws(fits)[:1]}
  assert "e₀" in line and "images₀ = 4,000" in line


def test_too_few_points_have_a_note_and_no_curve():
  sizes = {f"s-{n}": dict(model="s", images=n, parameters=1) for n in (10, 20)}
  data = measure({arm: [(0.3, 1.0)] for arm in sizes})
  fits = scaling.fit_metrics(data, [TOP1], sizes)
  (chart,) = scaling.draw_scaling(data, [TOP1], sizes, fits)
  assert "dashed" not in chart.svg
  assert scaling.fits_table(fits)[1:] == [[TOP1.name, "–", "2"]]
  assert "not identifiable" in scaling.describe_laws(fits)[0]
  keys = {arm: {0: {TOP1.name: arm}} for arm in sizes}
  data = dataclasses.replace(data, protocols=keys)
  fits = scaling.fit_metrics(data, [TOP1], sizes)
  assert fits[TOP1.name].note == "measured in different ways"


@pytest.mark.parametrize("width", [1200, 390])
def test_page_of_a_ladder(tmp_path, browser, width):
  study_samples.write_study(tmp_path, "ladder", LADDER)
  study_page.write_study(tmp_path)
  page = Outline((tmp_path / "report.html").read_text())
  assert page.headings == [
    "Study: ladder", "Results", "Zero-shot classification",
    "Image-text retrieval", "Depth probe", "Held-out images",
    "Depth probe: examples", "Arms", "Differences from vl",
    "Differences from the arm before", "Training", "Gradients of objectives",
    "ssl", "all", "Runs", "Configs",
  ]  # fmt: skip
  assert page.tags.count("img") == 3  # One seed per arm.
  text = (tmp_path / "report.md").read_text()
  assert "| seeds | vl 3, ssl 3, all 3 |" in text
  assert "](runs/vl-s0/evals/depth_probe_400/examples.png)" in text
  for dark in (False, True):
    check_layout(browser, tmp_path / "report.html", width, dark=dark)


def test_arms_that_are_evaluated_in_other_ways_are_named(tmp_path):
  study_samples.write_study(
    tmp_path, "ladder", LADDER, seeds=1, interference=False, sheets=()
  )
  study_page.write_study(tmp_path)
  page = tmp_path / "report.md"
  assert "in different ways" not in page.read_text()
  for arm, regions in (("vl", "crop"), ("ssl", "crop"), ("all", "prompter")):
    file = tmp_path / "runs" / f"{arm}-s0" / "evals" / "zero_shot_400.json"
    content = json.loads(file.read_text())
    protocol = content["evals"]["zero_shot"]["protocol"]
    protocol |= dict(regions=regions, seconds=len(arm))
    file.write_text(json.dumps(content))
  study_page.write_study(tmp_path)
  text = page.read_text()
  assert "in different ways" in text and "seconds" not in text
  assert "- zero_shot: regions crop in vl, ssl; prompter in all\n" in text
  row = next(r for r in text.splitlines() if r.startswith("| zero_shot/top1"))
  assert "measured in different ways" in text and "**" not in row
  assert "but not whether a setting or the seed" in text
  # One seed: intervals over items alone, and nothing is better or worse.
  assert "| no verdict | one seed:" in text and "] better |" not in text
  assert "not written down before the first run" in text


def test_verdicts_are_of_the_family_alone(tmp_path, capsys):
  study_samples.write_study(
    tmp_path, "ladder", LADDER, seeds=5, interference=False, sheets=()
  )
  study = runner.read(tmp_path)
  family = ComparisonFamily.of_runs(study.runs, [("all", "vl")])
  study = dataclasses.replace(study, family=family)
  (tmp_path / "study.json").write_text(json.dumps(study.to_dict()))
  results = statistics.read_study(tmp_path)
  tests = statistics.run_tests(results)
  assert len(tests) == 3  # Main metrics, of one comparison.
  smallest = min(tests.values(), key=lambda c: c.p)
  assert smallest.p_holm == pytest.approx(3 * smallest.p)
  study_page.write_study(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "Written before the first run." in text
  start = text.index("## Differences from vl")
  line = text[start : text.index("##", start + 5)].splitlines()
  (row,) = [x for x in line if x.startswith("| zero_shot/top1 (%) | +")]
  assert row.endswith("] better |") and row.count("better") == 1
  steps = text[text.index("## Differences from the arm before") :]
  assert "] better |" not in steps.partition("## Training")[0]
  argv = ["power", f"--output={tmp_path}", "--effect=3"]
  assert run_command("study", argv) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split()[:2] == ["comparison", "axis"]
  assert all("all − vl" in line for line in lines[1:4])
  assert "family of 3;" in "".join(lines[4:])
  for effect in ("0", "nan"):
    with pytest.raises(SystemExit, match="above 0"):
      run_command("study", [*argv[:2], f"--effect={effect}"])
  with pytest.raises(SystemExit, match="needs --config"):
    run_command("study", ["ladder", f"--output={tmp_path}"])
  # Runs that are added later are told.
  seeds = {"vl": 5, "all": 3}
  fewer = dataclasses.replace(family, seeds=seeds, num_started_runs=2)
  study = dataclasses.replace(study, family=fewer)
  (tmp_path / "study.json").write_text(json.dumps(study.to_dict()))
  study_page.write_study(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "Written when the folder had 2 started runs." in text
  assert "Planned seeds: vl 5, all 3; runs were added later." in text
  # Tests that wait for runs count in the correction, with seeds added later.
  family = ComparisonFamily.of_runs(study.runs, [("all", "vl"), ("ssl", "vl")])
  fewer = dataclasses.replace(family, seeds=dict.fromkeys(family.seeds, 3))
  study = dataclasses.replace(study, family=fewer)
  (tmp_path / "study.json").write_text(json.dumps(study.to_dict()))
  shutil.rmtree(tmp_path / "runs" / "ssl-s4")
  tests = statistics.run_tests(statistics.read_study(tmp_path))
  tests = [row for key, row in tests.items() if "all" in key]
  smallest = min(tests, key=lambda c: c.p)
  assert smallest.p_holm == pytest.approx(6 * smallest.p)
  study_page.write_study(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "3 of them wait for runs" in text
  # Power counts them, too, if no run of the arm has finished.
  for seed in range(4):
    shutil.rmtree(tmp_path / "runs" / f"ssl-s{seed}")
  assert run_command("study", argv) == 0
  assert "family of 6;" in " ".join(capsys.readouterr().out.split())


def test_page_of_pairs(tmp_path):
  arms = [("a", ("a",), 0.0), ("b", ("b",), 0.1), ("a+b", ("a", "b"), 0.3)]
  study_samples.write_study(tmp_path, "pairs", arms, seeds=2)
  study_page.write_study(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "## Synergy" in text
  assert "![zero_shot/top1 (%)](charts/synergy_zero_shot-top1.svg)" in text
  assert "| a+b − sum of both |" in text


def test_page_of_scaling(tmp_path, monkeypatch):
  counts = {"s": 1000, "m": 4000, "l": 16000}
  monkeypatch.setattr(
    study_page, "count_parameters", lambda c: counts[c["model"]["variant"]]
  )
  monkeypatch.setattr(scaling, "_RESAMPLES", 5)
  arms = [
    (f"{model}-{images}", OBJECTIVES[:1], 0.05 * (i + k), {"variant": model})
    for i, model in enumerate(counts)
    for k, images in enumerate((1000, 4000, 16000))
  ]
  study_samples.write_study(tmp_path, "scaling", arms, seeds=1, sheets=())
  study_page.write_study(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "## Scaling" in text and "## Differences" not in text
  assert "![zero_shot/top1 (%)](charts/scaling_zero_shot-top1.svg)" in text
  assert "## Images" not in text
  chart = tmp_path / "charts" / "scaling_zero_shot-top1.svg"
  assert "distinct images" in chart.read_text()


def test_scaling_without_limits_is_over_the_images_seen(tmp_path, monkeypatch):
  monkeypatch.setattr(study_page, "count_parameters", lambda c: 1000)
  arms = [(f"{model}-all", OBJECTIVES[:1], 0.1) for model in ("s", "l")]
  study_samples.write_study(tmp_path, "scaling", arms, seeds=1, sheets=())
  (run, _) = runner.read(tmp_path).runs
  assert study_page.measure_size(run)["images"] == run.images
  study_page.write_study(tmp_path)
  chart = (tmp_path / "charts" / "scaling_zero_shot-top1.svg").read_text()
  assert "images seen" in chart and "distinct" not in chart


def test_times_are_of_this_device_only_if_it_is_measured(tmp_path, monkeypatch):
  study_samples.write_study(tmp_path, "ladder", LADDER, seeds=1)
  study = runner.read(tmp_path)
  runs = tuple(dataclasses.replace(r, flops=1e12) for r in study.runs)
  study = dataclasses.replace(study, runs=runs)
  assert "at the rate of the runs so far" in runner.format_runs(tmp_path, study)
  for run in runs:
    # Two lines that crashes have truncated: their run repairs them.
    metrics = tmp_path / "runs" / run.name / "metrics.jsonl"
    metrics.write_text('{"step": 1, "spe{"step": 1}\n{"ste')
  monkeypatch.setattr(runner, "matmul_peak", lambda dtype: 8e9)
  table = runner.format_runs(tmp_path, study)
  assert "at 1 GFLOP/s of a matrix product on one" in table
  table = runner.format_runs(tmp_path, study, measure=False)
  assert table.endswith("0 of 3 runs to train")


def test_page_of_an_unfinished_study(tmp_path):
  study_samples.write_study(
    tmp_path / "one", "ladder", LADDER, seeds=1, interference=False, sheets=()
  )
  for name in ("ssl-s0", "all-s0"):
    (tmp_path / "one" / "runs" / name / "checkpoints" / "400").rmdir()
  file = tmp_path / "one" / "study.json"
  study = json.loads(file.read_text())
  study["runs"][0]["flops"] = 2.5e12
  file.write_text(json.dumps(study))
  argv = [str(tmp_path / "one"), f"--output={tmp_path / 'out'}"]
  assert run_command("report", argv) == 0
  text = (tmp_path / "out" / "report.md").read_text()
  assert "| finished | 1 of 3 runs |" in text
  assert "| not finished | ssl-s0, all-s0 |" in text
  assert "| TFLOP of a run | vl 2.5 |" in text
  assert "missing" in text and "## Gradients" not in text
  study = json.loads((tmp_path / "one" / "study.json").read_text())
  (tmp_path / "none").mkdir()
  (tmp_path / "none" / "study.json").write_text(json.dumps(study))
  study_page.write_study(tmp_path / "none")
  assert "No run is finished." in (tmp_path / "none" / "report.md").read_text()
