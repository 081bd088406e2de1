"""Tables, results JSON, charts and the sections of a report."""

import dataclasses
import html.parser
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from mtv_jax.evals import suite
from mtv_jax.evals.core import base, results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import (
  references,
  report,
  sections,
  tables,
)
from mtv_jax.utils import charts, markdown

DEPTH = Result(
  {"rmse": 0.5, "delta1": 0.75},
  {"encoder": "a", "data": "nyu", "data_hash": "1", "images": 20},
  {"rmse": 1.5},
  units={"rmse": "m"},
  lower=("rmse",),
  errors={"rmse": 0.03, "delta1": 0.02},
)
SHOT = Result(
  {"top1": 0.25},
  {"encoder": "a", "data_hash": "2", "size": (3, 4)},
  {"top1": 0.1},
)


def outcome(name, depth=0.5, **kwargs):
  depth = dataclasses.replace(
    DEPTH,
    metrics={"rmse": depth, "delta1": 0.75},
    protocol={**DEPTH.protocol, "encoder": name},
    sheets={},
  )
  shot = dataclasses.replace(SHOT, protocol={**SHOT.protocol, "encoder": name})
  fields = {
    "results": {"depth": depth, "shot": shot},
    "protocol": {"encoder": name},
    "version": "0",
    **kwargs,
  }
  return Outcome(name=name, encoder=name, weights="student", **fields)


def cells(line):
  return [cell.strip() for cell in line.strip("|").split("|")]


def markdown_metrics(outcomes):
  return markdown.table(tables.metrics_table(outcomes), numbers=2)


def test_units_and_direction():
  lines = tables.format_metrics([outcome("a")]).splitlines()
  assert lines[0].split() == ["evaluation", "metric", "unit", "a", "chance"]
  want = "depth rmse m (lower) 0.500 ± 0.03 1.500"
  assert " ".join(lines[2].split()) == want
  assert lines[3].split() == ["depth", "delta1", "%", "75.00", "±", "2.00"]
  assert lines[4].split() == ["shot", "top1", "%", "25.00", "10.00"]
  assert lines[5:] == ["±: standard error over the items of the set"]


@pytest.mark.parametrize(
  ("value", "unit", "want"),
  [
    (12.3456, "%", "12.35"),
    (0.0, "%", "0.00"),
    (0.0823, "", "0.082"),
    (0.0012345, "m", "0.001234"),
    (123456.7, "", "1.235e+05"),
    (0.0, "", "0.000"),
    (None, "m", "-"),
  ],
)
def test_number_format(value, unit, want):
  assert tables.format_number(value, unit) == want


def test_markdown_marks_best_and_missing_values():
  other = outcome("b|c", depth=0.25)
  del other.results["shot"]
  lines = markdown_metrics([outcome("a"), other]).splitlines()
  assert lines[0] == "| evaluation | metric | a | b\\|c | chance |"
  rmse, delta, top1 = map(cells, lines[2:])
  both = ["0.500 ± 0.03 m", "**0.250 ± 0.03 m**"]
  assert rmse == ["depth", "rmse ↓", *both, "1.500 m"]
  assert delta == ["depth", "delta1", *["75.00 ± 2.00 %"] * 2, ""]
  assert top1 == ["shot", "top1", "25.00 %", "-", "10.00 %"]


@pytest.mark.parametrize(
  ("values", "errors", "chance", "best"),
  [
    # sqrt(3² + 4²) = 5: a difference of 10 is not beyond 2 errors.
    ((60.0, 70.0), (3, 4), 10, None),
    ((60.0, 70.1), (3, 4), 10, 1),
    ((60.0, 70.1, 61.0), (3, 4, 3), 10, None),
    # Chance + 2 errors is 10.2.
    ((8.0, 10.1), (0.1, 0.1), 10, None),
    ((8.0, 10.3), (0.1, 0.1), 10, 1),
    ((8.0, 10.3), (0.1, 0.1), None, 1),
    # Unknown errors, also of the others; missing values don't matter.
    ((10.0, 90.0), (1, None), 5, None),
    ((10.0, 90.0), (None, 1), 5, None),
    ((10.0, 90.0, None), (1, 1, None), 5, 1),
    ((90.0, None), (1, None), 5, None),
  ],
)
def test_best_is_beyond_errors_and_chance(values, errors, chance, best):
  def outcome_of(value, error):
    result = Result(
      {} if value is None else {"x": value / 100},
      {"data_hash": "1"},
      {} if chance is None else {"x": chance / 100},
      errors={} if error is None else {"x": error / 100},
    )
    return Outcome("a", "a", "student", {"e": result})

  columns = [outcome_of(*v) for v in zip(values, errors, strict=True)]
  (row,) = tables.compare(columns)
  assert row.best == best
  text = tables.format_metrics(columns)
  assert text.count(" *") == (best is not None)
  assert ("*: is better than" in text) == (best is not None)
  bold = [
    cell.startswith("**")
    for cell in cells(markdown_metrics(columns).splitlines()[2])
  ]
  assert bold[2:-1] == [i == best for i in range(len(values))]


def test_results_on_other_data_are_not_compared():
  other = outcome("b", depth=0.25)
  protocol = {**DEPTH.protocol, "data_hash": "other"}
  other.results["depth"] = dataclasses.replace(DEPTH, protocol=protocol)
  row = tables.compare([outcome("a"), other])[0]
  assert row.values == (0.5, None) and row.best is None


@pytest.mark.parametrize(
  "key", ["protocol", "options", "train_hash", "train_data_hash"]
)
def test_best_needs_equal_protocols(key):
  def marked(value):
    other = outcome("b", depth=0.25)
    other.results["depth"].protocol[key] = value
    mine = outcome("a")
    mine.results["depth"].protocol[key] = "linear"
    assert tables.compare([mine, other])[0].values == (0.5, 0.25)
    return "**0.250 ± 0.03 m**" in markdown_metrics([mine, other])

  assert marked("linear")
  assert not marked("dpt")


def test_equal_protocol_entries_are_shown_once():
  shown = tables.compare_protocols([outcome("a"), outcome("b")], "depth")
  # The encoder's own entries are in the table of encoders.
  assert shown.common == {"data": "nyu", "data_hash": "1", "images": 20}
  assert shown.differing == {}
  other = outcome("b")
  other.results["depth"].protocol["images"] = 7
  other.results["depth"].protocol["crop"] = "eigen"
  shown = tables.compare_protocols([outcome("a"), other], "depth")
  assert shown.differing == {"images": [20, 7], "crop": [None, "eigen"]}
  text = tables.format_results([outcome("a"), other])
  assert "  images of a: 20\n  images of b: 7" in text
  assert "a:\n  encoder: a" in text


@pytest.mark.parametrize("count", [1, 2])
def test_json_round_trip(tmp_path, count):
  broken = outcome("a", skipped={"text": "none"}, failed={"x": "boom"})
  broken.results["depth"].metrics["rmse"] = math.nan
  broken.results["depth"].protocol["threshold"] = np.float32(0.5)
  broken.results["depth"].sheets["sheet"] = np.zeros((2, 2, 3), np.uint8)
  path = tmp_path / "deep" / "results.json"
  results.write(path, [broken, outcome("b")][:count])

  def reject(name):
    raise AssertionError(f"{name} is not JSON")

  content = json.loads(path.read_text(), parse_constant=reject)
  assert ("encoders" in content) == (count == 2)
  back = results.read(path)
  assert [o.name for o in back] == ["a", "b"][:count]
  assert math.isnan(back[0].results["depth"].metrics["rmse"])
  assert back[0].results["depth"].lower == ("rmse",)
  assert back[0].results["depth"].errors == DEPTH.errors
  assert back[0].results["depth"].protocol["threshold"] == 0.5
  assert back[0].results["depth"].sheets == {}
  assert (back[0].skipped, back[0].failed) == ({"text": "none"}, {"x": "boom"})
  assert [p.name for p in path.parent.iterdir()] == ["results.json"]
  # A protocol read from JSON equals the original.
  assert tables.compare_protocols([broken, back[0]], "shot").differing == {}


def test_json_without_results_is_rejected(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"annotations": []}')
  with pytest.raises(ValueError, match=r"\['annotations'\]; expected the res"):
    results.read(path)
  path.write_text('{"evals": {}}')
  with pytest.raises(ValueError, match="can't be read.*encoder"):
    results.read(path)
  path.write_text("x")
  with pytest.raises(ValueError, match="is not JSON"):
    results.read(path)


def whole(images=50_000):
  shot = Result(
    {"top1": 0.7}, {"images": images, "classes": 1000}, {"top1": 0.001}
  )
  coco = Result(
    {"text_to_image_r1": 0.4, "image_to_text_r1": 0.6},
    {"images": 5000, "captions": 25_010},
  )
  return Outcome("ours", "ours", "ema", {"zero_shot": shot, "retrieval": coco})


def rows_of(chart):
  """(name, value, chance) of a chart's rows, and which are hollow."""
  svg = ET.fromstring(charts.to_file(chart))
  titles = [
    (mark.get("class"), mark[0].text)
    for mark in svg.iter("{http://www.w3.org/2000/svg}circle")
    if len(mark)
  ]
  values = {}
  for _, text in titles:
    name, _, value = text.partition(": ")
    values[name] = float(value.split()[0])
  return values, [t.partition(":")[0] for css, t in titles if css == "hollow"]


def draw(columns, *, size):
  return report.draw_charts(columns, tables.compare(columns), size=size)


def test_published_figures_need_the_same_data():
  drawn, quoted = draw([whole()], size="base")
  assert quoted == ["imagenet", "coco_t2i", "coco_i2t"]
  assert [chart.title for chart in drawn] == [
    "ImageNet zero-shot",
    "COCO text to image R@1",
    "COCO image to text R@1",
  ]
  values, hollow = rows_of(drawn[0])
  assert values["ours"] == 70.0 and values["SigLIP 2 B/16"] == 78.2
  assert "ours" not in hollow and len(hollow) == len(values) - 1 == 4
  assert "MTV L/16" not in values
  assert drawn[0].svg.count("chance: 0.1 %") == len(values)
  # A subset of ImageNet counts as different data.
  drawn, quoted = draw([whole(images=500)], size="large")
  assert quoted == ["coco_t2i", "coco_i2t"]
  assert rows_of(drawn[0]) == ({"ours": 70.0}, [])
  assert rows_of(drawn[1])[0]["MTV L/16"] == 43.0
  built = report.build_report([whole(images=500)], size="large")
  blocks = [*sections.describe_report(built)]
  assert any("arXiv" in b.content for b in blocks if b.function == "note")
  rows = [row for b in blocks if b.function == "table" for row in b.content]
  assert ["MTV L/16", "43", "58.1"] in rows
  drawn, quoted = draw([whole()], size=None)
  assert quoted == [] and rows_of(drawn[0])[0] == {"ours": 70.0}


_NYU = {"images": 654, "crop": "nyu_eigen", "depth": "raw, mm"}
_ADE = {"images": 2000, "classes": 150, "train_split": "train"}
_COCO = {"images": 5000, "captions": 25_010}
_NAVI = {"dataset": "NAVI", "subset": "wild_set", "pairs": 575}
_SPAIR = {
  "dataset": "SPair-71k",
  "split": "test",
  "classes": 18,
  "threshold": 0.1,
}


@pytest.mark.parametrize(
  ("evaluation", "metric", "fits", "other"),
  [
    ("depth_probe", "rmse", _NYU, {"images": 100}),
    ("depth_probe", "rmse", _NYU, {"crop": "none"}),
    ("depth_probe", "rmse", _NYU, {"depth": "filled, mm"}),
    ("segmentation", "miou", _ADE, {"train_split": "test"}),
    ("segmentation", "miou", _ADE, {"train_split": None}),
    ("segmentation", "miou", _ADE, {"images": 200}),
    ("retrieval", "text_to_image_r1", _COCO, {"split": "val"}),
    ("geometric_correspondence", "avg_recall", _NAVI, {"subset": "multiview"}),
    ("geometric_correspondence", "avg_recall", _NAVI, {"pairs": 9}),
    ("semantic_correspondence", "recall", _SPAIR, {"split": "val"}),
    ("semantic_correspondence", "recall", _SPAIR, {"threshold": 0.05}),
  ],
)
def test_other_data_match_no_published_column(evaluation, metric, fits, other):
  assert references.matching_column(evaluation, metric, fits) is not None
  assert (
    references.matching_column(evaluation, metric, {**fits, **other}) is None
  )


def test_published_columns():
  nyu = _NYU
  assert references.matching_column("depth_probe", "rmse", nyu) == "nyu"
  mat = {**nyu, "depth": "raw (rawDepths), float32"}
  assert references.matching_column("depth_probe", "rmse", mat) == "nyu"
  karpathy = {**_COCO, "split": "test"}
  name = "image_to_text_r1"
  assert references.matching_column("retrieval", name, karpathy) == "coco_i2t"
  assert references.matching_column("depth_probe", "rmse", nyu) == "nyu"
  assert references.matching_column("depth_probe", "delta1", nyu) is None


class Reader(html.parser.HTMLParser):
  """Counts tags and lists external resources."""

  def __init__(self):
    super().__init__()
    self.tags, self.external, self.text = [], [], ""

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    for name, value in attributes:
      inside = value and value.startswith(("data:image/", "#"))
      if name in ("src", "href") and not inside:
        self.external.append(value)

  def handle_data(self, data):
    self.text += data


def test_report_folder(tmp_path):
  first, second = outcome("a/b"), outcome("a:b", skipped={"text": "no <tower>"})
  for one in (first, second):
    one.results["depth"].sheets["sheet"] = np.full((4, 6, 3), 99, np.uint8)
  folder = tmp_path / "out"
  files = suite.write(folder, [first, second], compared=[whole()])
  assert sorted(str(f.relative_to(folder)) for f in files) == [
    "charts/metric_depth_rmse.svg",
    "charts/metric_retrieval_image_to_text_r1.svg",
    "charts/metric_retrieval_text_to_image_r1.svg",
    "charts/metric_shot_top1.svg",
    "charts/metric_zero_shot_top1.svg",
    "report.html",
    "results.json",
    "results.md",
    "sheets/depth_sheet_a-b-.png",
    "sheets/depth_sheet_a-b.png",
  ]
  assert all(f.stat().st_size for f in files)
  # Earlier results are shown but not written again.
  written = results.read(folder / "results.json")
  assert [o.name for o in written] == ["a/b", "a:b"]
  page = Reader()
  page.feed((folder / "report.html").read_text(encoding="utf-8"))
  assert page.external == []
  assert page.tags.count("img") == 2 and page.tags.count("svg") == 5
  assert "text (a:b): no <tower>" in page.text
  for word in ("0.500 ± 0.03 m", "ours", "Protocol", "data_hash"):
    assert word in page.text
  text = (folder / "results.md").read_text(encoding="utf-8")
  for link in ("charts/metric_depth_rmse.svg", "sheets/depth_sheet_a-b.png"):
    assert f"]({link})" in text


def test_earlier_results_on_other_data_are_named():
  other = outcome("old")
  for result in other.results.values():
    result.protocol["data_hash"] = "another"
  built = report.build_report([outcome("a")], compared=[other, outcome("b")])
  assert [o.name for o in built.columns] == ["a", "b"]
  assert built.left_out == ["old"]
  notes = [b.content for b in sections.describe_report(built)]
  assert "Not shown, for lack of the same data: old." in notes


def test_equal_names_are_numbered():
  built = report.build_report(
    [outcome("a")], compared=[outcome("a"), outcome("a")]
  )
  assert [o.name for o in built.columns] == ["a", "a (2)", "a (3)"]


def test_changed_options_are_those_that_metrics_depend_on():
  def changed(kind, **options):
    return base.build_evaluator(kind, options).changed_options()

  assert changed("zero_shot", count=7, batch_size=3) == {}
  assert changed("zero_shot", view="center") == {"view": "center"}
  semantic = changed("semantic_correspondence", image_mean="imagenet", count=9)
  assert semantic == {"image_mean": "imagenet"}
  # The batch of a training matters.
  assert changed("depth_probe", batch_size=3) == {"batch_size": 3}
