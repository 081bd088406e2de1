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
from mtv_jax.report.page import Bullets, Details, Headlines, Note, Table
from mtv_jax.utils.errors import ConfigError

SIGLIP = "google/siglip-base-patch16-224"
SIGLIP_2 = "google/siglip2-base-patch16-224"


def whole(images=50_000):
  protocol = {"images": images, "classes": 1000}
  shot = Result({"top1": 0.7}, protocol, {"top1": 0.001})
  recall = {"text_to_image_r1": 0.4, "image_to_text_r1": 0.6}
  coco = Result(recall, {"images": 5000, "captions": 25_010})
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
  titles = "COCO text to image R@1", "COCO image to text R@1"
  assert [c.title for c in drawn] == ["ImageNet zero-shot", *titles]
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
_SPAIR = {"dataset": "SPair-71k", "split": "test", "classes": 18}
_SPAIR |= {"threshold": 0.1}
_MAT = {"depth": "raw (rawDepths), float32"}


@pytest.mark.parametrize(
  ("name", "protocol", "same", "other"),
  [
    ("depth_probe/rmse", _NYU, {}, {"images": 100}),
    ("depth_probe/rmse", _NYU, {}, {"crop": "none"}),
    ("depth_probe/rmse", _NYU, _MAT, {"depth": "filled, mm"}),
    ("segmentation/miou", _ADE, {}, {"train_split": "test"}),
    ("segmentation/miou", _ADE, {}, {"train_split": None}),
    ("segmentation/miou", _ADE, {}, {"images": 200}),
    ("retrieval/image_to_text_r1", _COCO, {"split": "test"}, {"split": "val"}),
    ("geometric_correspondence/avg_recall", _NAVI, {}, {"subset": "multiview"}),
    ("geometric_correspondence/avg_recall", _NAVI, {}, {"pairs": 9}),
    ("semantic_correspondence/recall", _SPAIR, {}, {"split": "val"}),
    ("semantic_correspondence/recall", _SPAIR, {}, {"threshold": 0.05}),
  ],
)
def test_other_data_match_no_published_column(name, protocol, same, other):
  evaluation, metric = name.split("/")

  def column(entries):
    return published.matching_column(evaluation, metric, protocol | entries)

  assert column({}) == column(same)
  names = dict(depth_probe="nyu", retrieval="coco_i2t")
  assert column({}) == names.get(evaluation, column({})) is not None
  assert column(other) is None
  assert published.matching_column("depth_probe", "delta1", _NYU) is None


def test_report_folder(tmp_path):
  first = make_outcome("a/b")
  second = make_outcome("a:b", skipped={"text": "no <tower>"})
  for one in (first, second):
    one.results["depth"].sheets["sheet"] = np.full((4, 6, 3), 99, np.uint8)
  folder = tmp_path / "out"
  files = evaluations.write_evaluation(
    folder, [first, second], compared=[whole()]
  )
  metrics = ["depth_rmse", "retrieval_image_to_text_r1"]
  metrics += ["retrieval_text_to_image_r1", "shot_top1", "zero_shot_top1"]
  assert sorted(str(f.relative_to(folder)) for f in files) == [
    *(f"charts/metric_{name}.svg" for name in metrics),
    *("report.html", "results.json", "results.md"),
    *("sheets/depth_sheet_a-b-.png", "sheets/depth_sheet_a-b.png"),
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
  note = "Not shown, as they lack the same data: old."
  assert Note(note) in blocks
  first = next(b for b in blocks if isinstance(b, Headlines)).headlines[0]
  names = [figure.partition(":")[0] for figure in first.figures]
  assert names == ["a", "a (2)", "a (3)"]


def make_knn(name, hits, checkpoint=""):
  """k-NN on n items with a sheet, and zero-shot without resamples."""
  estimate = bootstrap.means({"top1_k20": hits, "top1_k10": ~hits})
  protocol = {"data_hash": "1", "images": 50_000, "classes": 1000, "k": [20]}
  sheet = np.full((30, 90, 3), 5 * len(name), np.uint8)
  options = dict(errors=estimate.errors, resamples=estimate.resamples)
  options |= dict(sheets={"neighbours": sheet})
  result = Result(estimate.metrics, protocol, {"top1_k20": 0.1}, **options)
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
  assert one.high - one.low == pytest.approx(3.92 * error, rel=0.15)
  assert found["zero_shot/top1", "second"].items == "errors"


def test_results_of_another_protocol_have_no_difference(encoders, tmp_path):
  first, second, _ = encoders
  knn = second.results["knn"]
  other = dataclasses.replace(knn, protocol={**knn.protocol, "options": "x"})
  second = dataclasses.replace(second, results={**second.results, "knn": other})
  found = differences_of([first, second])
  assert found["knn/top1_k20", "second"].verdict == "missing"
  assert found["zero_shot/top1", "second"].verdict == "not distinguishable"
  evaluations.write_evaluation(tmp_path, [first, second], baseline="first")
  text = (tmp_path / "report.md").read_text()
  assert "| knn/top1_k20 (%) | missing |" in text
  assert "| zero_shot/top1 (%) | +0.0 [−2.8, +2.8] not distinguish" in text


def test_an_unknown_baseline_raises(encoders, tmp_path):
  with pytest.raises(ConfigError, match="Did you mean 'first'"):
    evaluations.write_evaluation(tmp_path, encoders, baseline="frist")
  assert [*tmp_path.iterdir()] == []


def test_comparison_and_its_layout(encoders, tmp_path, browser):
  files = evaluations.write_evaluation(tmp_path, encoders, baseline="second")
  assert all(file.stat().st_size for file in files)
  page = Outline((tmp_path / "report.html").read_text())
  assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
  assert page.headings[1:] == [
    "Encoders", "Results", "k-NN classification", "Zero-shot classification",
    "Held-out images", "k-NN classification: neighbours", "Metrics",
    "Differences from second", "Published figures", "Protocols",
  ]  # fmt: skip
  assert page.tags.count("img") == 3
  text = (tmp_path / "report.md").read_text()
  assert "first: 76.2 %" in text  # Zero-shot ImageNet.
  for encoder in encoders:
    assert f"![{encoder.name}](sheets/knn_neighbours" in text
  for width, dark in ((1280, False), (390, False), (390, True)):
    check_layout(browser, tmp_path / "report.html", width, dark=dark)


def imagenet(name, checkpoint="", *, images=50_000, **protocol):
  protocol = {"images": images, "classes": 1000, "data": "val", **protocol}
  result = Result({"top1": 0.77, "top5": 0.9}, protocol, errors={"top1": 0.002})
  evals = {"zero_shot": result}
  return Outcome(name, name, "ema", evals, checkpoint=checkpoint)


def blocks(*outcomes):
  return [*evaluations.describe_outcomes(outcomes, size=None)]


def texts(*outcomes):
  lines = []
  for block in blocks(*outcomes):
    if isinstance(block, Note):
      lines.append(block.text)
    elif isinstance(block, Bullets):
      lines += block.lines
  return lines


def metrics_table(*outcomes):
  found = blocks(*outcomes)
  (folded,) = [
    b for b in found if isinstance(b, Details) and b.summary.startswith("All")
  ]
  return folded.blocks[0].rows


def test_a_figure_is_beside_the_row_of_its_checkpoint():
  outcomes = [
    imagenet("mine"),
    imagenet("s2", SIGLIP_2, view="encoder", clean="canonicalize"),
    imagenet("clip", "openai/clip-vit-base-patch16", view="encoder"),
  ]
  table = metrics_table(*outcomes)
  assert table[0][-1] == "published"
  assert table[1][1] == "top1"
  assert table[1][-1] == "s2: 78.2 %\nclip: 68.3 %"
  assert table[2][1] == "top5" and table[2][-1] == ""
  found = [b.rows for b in blocks(*outcomes) if isinstance(b, Table)]
  (compared,) = (rows for rows in found if "published" in rows[0][3:4])
  name, *cells = compared[1]
  assert name == "ImageNet zero-shot"
  assert cells == ["s2", "77.00 ± 0.20 %", "78.2 %", "\u22121.20"]
  lines = texts(*outcomes)
  assert f"s2 is compared with figures published for {SIGLIP_2}." in lines
  (line,) = [t for t in lines if t.startswith("ImageNet zero-shot, s2")]
  assert "README_siglip2.md" in line
  assert line.endswith("Here view is encoder, not squash_center.")
  (line,) = [t for t in lines if t.startswith("ImageNet zero-shot, clip")]
  assert line.endswith("Here view is encoder, not open_clip.")


@pytest.mark.parametrize(
  "outcome",
  [
    imagenet("siglip2-base-patch16-224"),  # A name proves nothing.
    imagenet("a", "google/siglip2-base-patch16-999"),
    imagenet("a", "facebook/dinov2-base"),  # Lacks a figure of the metric.
    imagenet("a", SIGLIP_2, images=500),
  ],
)
def test_no_figure_without_checkpoint_metric_and_data(outcome):
  assert "published" not in metrics_table(outcome)[0]
  lines = texts(outcome)
  assert not any("78.2" in line for line in lines)
  here = "ImageNet zero-shot, a: here data val, images 500."
  is_subset = outcome.results["zero_shot"].protocol["images"] == 500
  assert (here in lines) == is_subset


def test_figures_have_a_source_and_a_known_column():
  for checkpoint, figures in published.FIGURES.items():
    organisation, name = checkpoint.split("/")
    assert organisation and name
    for column, figure in figures.items():
      assert column in published.COLUMNS
      assert figure.source and figure.protocol
      unit = (0.1, 1) if column == "nyu" else (10, 100)
      assert unit[0] < figure.value < unit[1]
  # Two sources of one figure agree.
  for row in published.REFERENCES:
    for column, value in row.figures.items():
      assert published.FIGURES[row.checkpoint][column].value == value


def test_charts_of_other_protocols_are_apart():
  outcomes = [imagenet("a"), imagenet("b", options={"view": "center"})]
  rows = tables.compare(outcomes, split=True)
  drawn, quoted = evaluations.draw_charts(outcomes, rows, size="base")
  assert quoted == ["imagenet"]
  titles = [f"ImageNet zero-shot (protocol {i})" for i in (1, 2)]
  assert [chart.title for chart in drawn] == titles
  assert len({chart.name for chart in drawn}) == 2
  assert "<title>a:" in drawn[0].svg and "<title>b:" not in drawn[0].svg
  assert "<title>b:" in drawn[1].svg and "<title>a:" not in drawn[1].svg


def test_rows_of_other_protocols_are_apart():
  first = [imagenet("a", data_hash="1"), imagenet("b", data_hash="2")]
  other = imagenet("c", data_hash="1", options={"view": "center"})
  outcomes = [*first, other, imagenet("d", data_hash="1")]
  rows = tables.compare(outcomes, split=True)
  values = [(r.label, r.values) for r in rows if r.metric == "top1"]
  assert values == [
    ("top1 (protocol 1)", (77.0, None, None, 77.0)),
    ("top1 (protocol 2)", (None, 77.0, None, None)),
    ("top1 (protocol 3)", (None, None, 77.0, None)),
  ]
