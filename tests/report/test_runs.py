"""Pages of runs: their parts, files, and how a browser shows them."""

import dataclasses
import html
import json
import math
import re

import numpy as np
import pytest
import study_samples
from page_checks import Outline, check_layout
from PIL import Image

from mtv_jax.cli.main import run_command
from mtv_jax.config import overrides
from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import write_arrays
from mtv_jax.report import run_folders
from mtv_jax.report import runs as run_pages
from mtv_jax.utils.errors import ConfigError, InputError, MissingFileError

HOSTILE = "a<b>&'\"|c"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  first = study_samples.write_run(
    folder / "first", objectives=("contrastive",), interference=False
  )
  return [first, study_samples.write_run(folder / HOSTILE, gain=0.2)]


def test_page_of_two_runs(runs, tmp_path):
  assert run_command("report", [*map(str, runs), f"--output={tmp_path}"]) == 0
  page = Outline((tmp_path / "report.html").read_text())
  assert page.headings == [
    f"Runs first, {HOSTILE}", "Results", "Zero-shot classification",
    "Image-text retrieval", "Depth probe", "Held-out images",
    "Depth probe: examples", "Training", "Gradients of objectives", HOSTILE,
    "Metrics", "Configs",
  ]  # fmt: skip
  assert "script" not in page.tags and "b" not in page.tags
  assert page.tags.count("img") == 2
  assert all(a.startswith(("data:image/", "#")) for a in page.addresses)

  text = (tmp_path / "report.md").read_text()
  links = re.findall(r"!\[.*\]\((.*)\)", text)
  assert len(links) == page.tags.count("svg") + 2
  for link in links:
    assert (tmp_path / link).stat().st_size > 0
  with Image.open(tmp_path / "sheets/first_depth_probe_examples.png") as sheet:
    assert sheet.size == (420, 180)


def test_page_of_one_run_in_its_folder(runs, tmp_path):
  run = study_samples.write_run(tmp_path / "run")
  (run / "command.txt").write_text("mtv-jax train --config=a\n")
  run_pages.write_runs([run], run)
  text = (run / "report.md").read_text()
  # Its sheets are not moved.
  assert "](evals/depth_probe_400/examples.png)" in text
  assert not (run / "sheets").exists()
  assert "```\nmtv-jax train --config=a\n```" in text
  page = (run / "report.html").read_text()
  assert "<pre>mtv-jax train --config=a</pre>" in page
  lines = run_pages.format_run(run).splitlines()
  assert lines[0].split()[-1] == "chance"
  row = next(line.split() for line in lines if " top5 " in line)
  assert row[-1] == "25.00"


def test_missing_parts_leave_no_section(tmp_path):
  run = tmp_path / "bare"
  run.mkdir()
  (run / "config.json").write_text('{"seed": 3}')
  run_pages.write_runs([run], tmp_path)
  page = Outline((tmp_path / "report.html").read_text())
  assert page.headings == ["Run bare", "Results", "Configs"]
  assert "No evaluation has" in (tmp_path / "report.html").read_text()
  assert run_pages.format_run(run) == ""


def test_bad_runs(runs, tmp_path):
  study = tmp_path / "study"
  study.mkdir()
  (study / "study.json").write_text("{}")
  for folders, error, message in (
    ([runs[0], runs[0] / "."], ConfigError, "given twice"),
    ([tmp_path], MissingFileError, "expected the folder of a run"),
    ([runs[0], study], ConfigError, "is a study. Pass it alone"),
  ):
    with pytest.raises(error, match=message):
      run_pages.write_runs(folders, tmp_path)


def test_last_evaluations_and_truncated_lines(runs, tmp_path):
  run = study_samples.write_run(tmp_path / "run", steps=400)
  for name in ("metrics", "interference"):
    with (run / f"{name}.jsonl").open("a") as file:
      file.write('{"step": 400, "loss"')
  read = run_folders.read_run(run)
  assert read.step == 400 and len(read.interference) == 4
  files = read.files
  assert {path.name for path in files.values()} == {
    f"{name}_400.json" for name in study_samples.METRICS
  }
  content = json.loads(files["zero_shot"].read_text())
  want = content["evals"]["zero_shot"]["metrics"]
  assert read.outcome.results["zero_shot"].metrics == want
  earlier = run_folders.read_run(run, step=200).outcome.results["zero_shot"]
  assert earlier.metrics.keys() == want.keys() and earlier.metrics != want


ZERO_SHOT = "evals/zero_shot_400.json"
SHEET = "evals/depth_probe_400/examples.png"


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("config.json", lambda x: x[:9], "Resume the run"),
    ("config.json", lambda x: b"[" * 10**5, "Resume the run"),
    ("config.json", lambda x: b"[1]", "not the config of a run"),
    ("config.json", lambda x: b'{"seed": "a"}', "seed is 'a'"),
    ("config.json", lambda x: b'{"objectives": 5}', "objectives is 5"),
    ("config.json", lambda x: b'{"batch_size": "x"}', "batch_size is 'x'"),
    ("config.json", lambda x: b'{"total_steps": []}', "total_steps is "),
    (ZERO_SHOT, lambda x: x[:-9], "Evaluate again, or remove it"),
    (ZERO_SHOT, lambda x: b"[" * 10**5, "Evaluate again, or remove it"),
    (ZERO_SHOT, lambda x: b"{}", "expected results"),
    (ZERO_SHOT, lambda x: b'{"encoders": 5}', "expected a list"),
    (ZERO_SHOT, lambda x: re.sub(rb"0\.\d+", b'"a"', x), "can't be read"),
    # A crash, after which another program appended.
    ("metrics.jsonl", lambda x: b'{"step": 1, "lo' + x, "line 1 is not a row"),
    ("metrics.jsonl", lambda x: b"{}\n" + x, "line 1 is not a row"),
    ("metrics.jsonl", lambda x: b"[" * 10**5 + b"\n" + x, "line 1 is not a"),
    ("metrics.jsonl", lambda x: b'{"step": -1}\n' + x, "line 1 is not a row"),
    ("interference.jsonl", lambda x: b"\xff\n" + x, "line 1 is not a row"),
    ("interference.jsonl", lambda x: b'{"step": 1}\n' + x, "step 1 is not"),
    ("interference.jsonl", lambda x: x.replace(b"[[", b"[", 1), "not a"),
    (SHEET, lambda x: x[:200], "damaged or not an image"),
    # 30,000 pixels square; nothing is decoded.
    (SHEET, lambda x: x[:16] + b"\0\0u0" * 2 + x[24:], "is damaged or not"),
  ],
)
def test_damaged_files_are_named(tmp_path, name, change, message):
  run = study_samples.write_run(tmp_path / "run", objectives=("a", "b"))
  file = run / name
  file.write_bytes(change(file.read_bytes()))
  with pytest.raises(InputError, match=message) as caught:
    run_pages.write_runs([run], tmp_path / "report")
  assert str(file) in str(caught.value)


@pytest.mark.parametrize(
  ("rows", "series"),
  [
    # A resumed run logs some steps twice.
    ([(1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0)], [(1, 3.0), (2, 2.0), (3, 1.0)]),
    ([(0, 1.0), (1, math.nan), (2, -math.inf), (3, None)], [(0, 1.0)]),
    ([(0, 1.0), (1, 1e308), (2, 10**400), (3, {})], [(0, 1.0)]),
  ],
)
def test_values_that_can_be_drawn_are_read_once(tmp_path, rows, series):
  run = study_samples.write_run(tmp_path / "run", sheets=())
  (run / "command.txt").write_bytes(b"mtv-jax train \xff")
  rows = [{"step": step, "depth/loss": value} for step, value in rows]
  (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  assert run_folders.read_run(run).series == {"depth/loss": series}
  run_pages.write_runs([run], tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert not re.search(r"\b(nan|inf)\b", page)
  assert "mtv-jax train \ufffd" in page


def test_figures_of_named_metrics(runs, tmp_path):
  argv = [str(runs[0]), f"--output={tmp_path}"]
  with (runs[0] / "metrics.jsonl").open("a") as file:
    file.write('{"step": 400, "speed/core_count": 8}\n')
  assert run_command("report", [*argv, "--names=^speed/core"]) == 0
  text = (tmp_path / "report.md").read_text()
  for name in ("core_hours", "core_count"):  # The latter has one value.
    assert f"![speed/{name}](charts/curve_speed-{name}.svg)" in text
  for names, message in (("x{", "no metric of"), ("(", "not a regular")):
    with pytest.raises(SystemExit, match=message):
      run_command("report", [*argv, f"--names={names}"])
  with pytest.raises(SystemExit, match="NUL"):
    run_command("report", [str(runs[0]), "--output=a\0b"])


def test_metrics_that_are_not_finite_are_missing(tmp_path):
  run = study_samples.write_run(tmp_path / "run", sheets=())
  r1 = "text_to_image_r1"
  for name, values in {
    "zero_shot": dict(metrics={"top1": math.nan, "top5": None}),
    "retrieval": dict(chance={r1: None}, errors={r1: math.nan}),
  }.items():
    file = run / "evals" / f"{name}_400.json"
    content = json.loads(file.read_text())
    content["evals"][name] |= values
    file.write_text(json.dumps(content))
  run_pages.write_runs([run], tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert "zero_shot" in page and not re.search(r"\b(nan|inf)\b", page)


def test_runs_without_a_common_metric(tmp_path):
  runs = []
  for name, kept in (("a", "zero_shot"), ("b", "depth_probe")):
    runs.append(study_samples.write_run(tmp_path / name, sheets=()))
    for file in runs[-1].glob("evals/*.json"):
      if not file.name.startswith(kept):
        file.unlink()
  run_pages.write_runs(runs, tmp_path / "report")
  text = (tmp_path / "report" / "report.md").read_text()
  rows = [line.split(" | ") for line in text.splitlines() if " top1 " in line]
  assert [row[3] for row in rows] == ["-"]
  assert "charts/metric_depth_probe_rmse.svg" in text


def test_many_runs_have_a_short_title_and_room_for_names(tmp_path):
  runs = [
    study_samples.write_run(
      tmp_path / f"run {i}", objectives=("depth",), sheets=(),
      variant=f"mu/{i}", interference=False,
    )
    for i in range(20)
  ]  # fmt: skip
  run_pages.write_runs(runs, tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert text.startswith("# 20 runs\n")
  svg = (tmp_path / "charts" / "curve_depth-loss.svg").read_text()
  height = int(re.search(r"height='(\d+)'", svg)[1])
  places = re.findall(r"x='([\d.]+)' y='(\d+)'>run \d+<", svg)
  assert len({*places}) == 20
  assert max(int(y) for _, y in places) < height


def test_curves_of_several_seeds_are_their_mean(runs):
  run, curves = run_folders.read_run(runs[1]), []
  for points in ([(1, 1.0), (2, 3.0), (3, 9.0)], [(1, 3.0), (2, 5.0)]):
    curves.append(dataclasses.replace(run, series={"depth/loss": points}))
  (chart,), _ = run_pages.draw_training_curves(curves)
  assert chart.title == "depth/loss"
  # Over common steps, one curve and one area.
  assert chart.svg.count("class='line'") == chart.svg.count("class='band'") == 1
  ends = re.findall(r"<title>([^<]*) at ", chart.svg)
  assert ends == [f"{html.escape(HOSTILE)}: {v}" for v in (2, 4)]


def test_differences_of_configs(runs):
  read = [run_folders.read_run(run) for run in runs]
  rows = run_pages.config_table(read)
  assert rows[0] == ["key", "first", HOSTILE]
  # An objective that one of them lacks is one row.
  assert rows[1:] == [
    [f"objectives.{name}", "–", '{"weight": 1.0}']
    for name in study_samples.OBJECTIVES[1:]
  ]
  assert run_pages.config_table([read[0], read[0]])[1:] == []

  def with_data(*entries, **keys):
    config = {"data": {"train": [*entries]}, "seed": 1} | keys
    return dataclasses.replace(read[0], config=config)

  long = "x" * 200
  one, two = dict(type="scenes", limit=5), dict(type="tfds", path=long)
  three = with_data(one, two | dict(path=long + "y"), balance=None, seed=2)
  assert run_pages.config_table([with_data(one, two), three])[1:] == [
    ["data.train[1].path", "x" * 160 + "…", "x" * 160 + "…"]
  ]
  configs = [with_data(one).config, with_data(one, two).config]
  ((key, values),) = overrides.list_differences(configs)
  assert key == "data.train" and values == ([one], [one, two])


@pytest.mark.parametrize("width", [1200, 390])
def test_browser_shows_runs(runs, tmp_path, browser, width):
  run_pages.write_runs(runs, tmp_path)
  for dark in (False, True):
    check_layout(browser, tmp_path / "report.html", width, dark=dark)


def write_evaluation(run, step, *, hits, rmse, data="scenes"):
  """k-NN on as many items as `hits`, and an error without resamples."""
  knn = bootstrap.means({"top1_k10": np.asarray(hits, bool)})
  protocol = {"data_hash": data}
  known = dict(errors=knn.errors, resamples=knn.resamples)
  results = {"knn": Result(knn.metrics, protocol, **known)}
  options = dict(lower=("rmse",), units={"rmse": "m"})
  results["depth_probe"] = Result({"rmse": rmse}, protocol, **options)
  for name, result in results.items():
    content = {"encoder": "a", "weights": "student", "mtv_jax": "0"}
    content["evals"] = {name: result.to_dict()}
    path = run / "evals" / f"{name}_{step}.json"
    path.write_text(json.dumps(content))
  write_arrays(run / "evals" / f"knn_{step}", results["knn"])


def write_continued_runs(folder):
  """Two seeds of two arms: one loses half its hits and regains them."""
  rng = np.random.default_rng(0)
  hits = rng.random(1000) < 0.6
  noisy = hits ^ (rng.random(1000) < 0.02)
  runs = []
  for arm, low in (("naive", hits & (rng.random(1000) < 0.5)), ("kept", noisy)):
    for seed in range(2):
      run = folder / f"{arm}_s{seed}"
      (run / "evals").mkdir(parents=True)
      config = {"seed": seed, "optim": {"name": arm}}
      (run / "config.json").write_text(json.dumps(config))
      for step, values in ((0, hits), (10, low), (20, hits)):
        write_evaluation(run, step, hits=values, rmse=1.0 + step / 100)
      runs.append(run)
  return runs


def test_changes_since_the_start(tmp_path):
  runs = write_continued_runs(tmp_path)
  run_pages.write_runs(runs, tmp_path / "report")
  page = Outline((tmp_path / "report/report.html").read_text())
  assert "Changes since the start" in page.headings
  text = (tmp_path / "report/report.md").read_text()
  rows = [line for line in text.splitlines() if "naive" in line]
  assert any("| 1 of 2 |" in row for row in rows)
  read = run_folders.name_arms([run_folders.read_run(run) for run in runs])
  assert [run.arm for run in read] == ["naive"] * 2 + ["kept"] * 2
  by_name = {c.metric.name: c for c in run_pages.measure_changes(read[:2])}
  naive = by_name["knn/top1_k10"]
  assert naive.start == pytest.approx(0.6, abs=0.05)
  steps = naive.worst_step, naive.best_step, naive.num_below_start
  assert steps == (10, 20, 1)
  lost = naive.by_step[10]
  assert lost.difference == pytest.approx(-0.3, abs=0.05)
  # The paired interval over 1,000 items.
  half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
  assert lost.low == pytest.approx(lost.difference - half, abs=0.01)
  assert lost.high == pytest.approx(lost.difference + half, abs=0.01)
  assert naive.by_step[20].difference == 0
  # Lower is better, and no interval is known.
  error = by_name["depth_probe/rmse"]
  steps = error.worst_step, error.best_step, error.num_below_start
  assert steps == (20, 10, None)
  kept = [c for c in run_pages.measure_changes(read[2:]) if not c.metric.lower]
  assert kept[0].num_below_start == 0


def test_changes_of_collapsed_and_of_other_evaluations(tmp_path):
  (run, _, *_) = write_continued_runs(tmp_path)
  write_evaluation(run, 10, hits=np.ones(8), rmse=math.nan)
  write_evaluation(run, 30, hits=np.ones(1000), rmse=0.5, data="other")
  run_pages.write_runs([run], tmp_path / "report")
  measured = run_pages.measure_changes([run_folders.read_run(run)])
  by_name = {c.metric.name: c for c in measured}
  assert list(by_name["depth_probe/rmse"].by_step) == [20]
  assert list(by_name["knn/top1_k10"].by_step) == [10, 20]
  (run / "evals" / "knn_0.json").unlink()
  measured = run_pages.measure_changes([run_folders.read_run(run)])
  assert [c.metric.name for c in measured] == ["depth_probe/rmse"]


def test_arms_are_runs_of_distinct_seeds(tmp_path):
  def names(*runs):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    read = []
    for name, seed in runs:
      (folder / name).mkdir(parents=True)
      (folder / name / "config.json").write_text(json.dumps({"seed": seed}))
      read.append(run_folders.read_run(folder / name))
    return [run.arm for run in run_folders.name_arms(read)]

  assert names(("run_10", 0), ("run_11", 1)) == ["run", "run"]
  assert names(("a-s0", 0), ("a-s1", 1), ("b", 2)) == ["a-s0"] * 3
  assert names(("a-s0", 0), ("a-s1", 1)) == ["a", "a"]
  assert names(("first", 0), ("again", 0)) == ["first", "again"]


def test_mean_cosines_leave_out_blocks_without_a_gradient(runs):
  rows = []
  for value in (0.4, 0.2, 0.0):
    cosines = np.zeros((2, 2, 2))
    cosines[0, 1] = cosines[1, 0] = value, 0.0
    row = dict(objectives=["a", "b"], blocks=["0", "pool"], step=len(rows))
    rows.append(row | dict(cosines=cosines.tolist()))
  run = dataclasses.replace(run_folders.read_run(runs[1]), interference=rows)
  (chart,) = run_pages.draw_interference([run])
  titles = re.findall("<title>(a, b, .*?)</title>", chart.svg)
  assert titles == ["a, b, 0: 0.3", "a, b, pool: no value"]
