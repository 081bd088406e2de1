"""Pages of evaluated encoders: charts, published figures, differences."""

import dataclasses
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from outcome_samples import make_outcome
from page_checks import Outline, check_layout

from mtv_jax.evals import published
from mtv_jax.evals.core import bootstrap, results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.report import charts, evaluations, tables
from mtv_jax.report.page import Note, Table
from mtv_jax.utils.errors import ConfigError

SIGLIP = "google/siglip-base-patch16-224"


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
  return evaluations.draw_charts(columns, tables.compare(columns), size=size)


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
  blocks = [*evaluations.describe_outcomes([whole(images=500)], size="large")]
  assert any("arXiv" in b.text for b in blocks if isinstance(b, Note))
  rows = [row for b in blocks if isinstance(b, Table) for row in b.rows]
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
  assert published.matching_column(evaluation, metric, fits) is not None
  assert (
    published.matching_column(evaluation, metric, {**fits, **other}) is None
  )


def test_published_columns():
  nyu = _NYU
  assert published.matching_column("depth_probe", "rmse", nyu) == "nyu"
  mat = {**nyu, "depth": "raw (rawDepths), float32"}
  assert published.matching_column("depth_probe", "rmse", mat) == "nyu"
  karpathy = {**_COCO, "split": "test"}
  name = "image_to_text_r1"
  assert published.matching_column("retrieval", name, karpathy) == "coco_i2t"
  assert published.matching_column("depth_probe", "rmse", nyu) == "nyu"
  assert published.matching_column("depth_probe", "delta1", nyu) is None


def test_report_folder(tmp_path):
  first = make_outcome("a/b")
  second = make_outcome("a:b", skipped={"text": "no <tower>"})
  for one in (first, second):
    one.results["depth"].sheets["sheet"] = np.full((4, 6, 3), 99, np.uint8)
  folder = tmp_path / "out"
  files = evaluations.write_evaluation(
    folder, [first, second], compared=[whole()]
  )
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
  html = (folder / "report.html").read_text(encoding="utf-8")
  page = Outline(html)
  assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
  assert page.tags.count("img") == 2 and page.tags.count("svg") == 5
  assert "text (a:b): no &lt;tower&gt;" in html
  for word in ("0.500 ± 0.03 m", "ours", "Protocol", "data_hash"):
    assert word in html
  text = (folder / "results.md").read_text(encoding="utf-8")
  for link in ("charts/metric_depth_rmse.svg", "sheets/depth_sheet_a-b.png"):
    assert f"]({link})" in text


def test_earlier_results_are_named_and_numbered():
  other = make_outcome("old")
  for result in other.results.values():
    result.protocol["data_hash"] = "another"
  columns = [make_outcome("a"), other, make_outcome("a"), make_outcome("a")]
  blocks = [*evaluations.describe_outcomes(columns[:1], compared=columns[1:])]
  note = "Not shown, for lack of the same data: old."
  assert Note(note) in blocks
  table = next(b for b in blocks if isinstance(b, Table))
  assert table.rows[0][2:-1] == ["a", "a (2)", "a (3)"]


def make_knn(name, hits, checkpoint=""):
  """k-NN on n items with a sheet, and zero-shot without resamples."""
  estimate = bootstrap.means({"top1_k20": hits, "top1_k10": ~hits})
  protocol = {"data_hash": "1", "images": 50_000, "classes": 1000, "k": [20]}
  sheet = np.full((30, 90, 3), 5 * len(name), np.uint8)
  result = Result(
    estimate.metrics,
    protocol,
    {"top1_k20": 0.1},
    errors=estimate.errors,
    resamples=estimate.resamples,
    sheets={"neighbours": sheet},
  )
  shot = Result({"top1": 0.7}, protocol, errors={"top1": 0.01})
  evals = {"knn": result, "zero_shot": shot}
  return Outcome(name, f"runs/{name}", "ema", evals, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def encoders():
  rng = np.random.default_rng(0)
  hard = rng.random(400)
  return [
    make_knn("first", hard < 0.6, SIGLIP),
    # Right on these items and on 5 % more.
    make_knn("second", hard < 0.65),
    make_knn("a third one with a long name", hard < 0.601),
  ]


def differences_of(outcomes):
  """The differences from the first one by metric and encoder."""
  rows = tables.compare(outcomes, split=True, baseline=0)
  return {(c.metric.name, c.arm): c for row in rows for c in row.differences}


def test_differences_are_paired_by_item(encoders):
  found = differences_of(encoders)
  one = found["knn/top1_k20", "second"]
  first, second, _ = (o.results["knn"].metrics["top1_k20"] for o in encoders)
  assert one.difference == pytest.approx(second - first)
  assert one.items == "resamples" and one.verdict == "better"
  # Far narrower than of independent errors: sqrt(d (1 - d) / n).
  error = np.sqrt(one.difference * (1 - one.difference) / 400)
  assert one.item_high - one.item_low == pytest.approx(3.92 * error, rel=0.15)
  assert found["zero_shot/top1", "second"].items == "errors"


def test_results_of_another_protocol_have_no_difference(encoders, tmp_path):
  first, second, _ = encoders
  knn = second.results["knn"]
  other = dataclasses.replace(knn, protocol={**knn.protocol, "options": "x"})
  second = dataclasses.replace(second, results={**second.results, "knn": other})
  found = differences_of([first, second])
  assert found["knn/top1_k20", "second"].verdict == "missing"
  assert found["zero_shot/top1", "second"].verdict == "not distinguishable"
  evaluations.write_comparison([first, second], tmp_path, baseline="first")
  text = (tmp_path / "report.md").read_text()
  assert "| knn/top1_k20 (%) | missing |" in text
  assert "| zero_shot/top1 (%) | +0.0 [−2.8, +2.8] not distinguish" in text


def test_an_unknown_baseline_raises(encoders, tmp_path):
  with pytest.raises(ConfigError, match="Did you mean 'first'"):
    evaluations.write_comparison(encoders, tmp_path, baseline="frist")
  assert [*tmp_path.iterdir()] == []


def test_comparison_and_its_layout(encoders, tmp_path, browser):
  files = evaluations.write_comparison(encoders, tmp_path, baseline="second")
  assert all(file.stat().st_size for file in files)
  page = Outline((tmp_path / "report.html").read_text())
  assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
  assert page.headings[1:5] == [
    "Metrics",
    "Differences from second",
    "Published figures",
    "Encoders",
  ]
  assert page.tags.count("img") == 3
  text = (tmp_path / "report.md").read_text()
  assert "first: 76.2 %" in text  # Zero-shot ImageNet.
  for encoder in encoders:
    assert f"neighbours, {encoder.name}" in text
  for width, dark in ((1280, False), (390, False), (390, True)):
    check_layout(browser, tmp_path / "report.html", width, dark=dark)
