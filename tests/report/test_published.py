"""Published figures beside results of their checkpoints."""

import pytest

from mtv_jax.evals import published
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.report import evaluations, tables
from mtv_jax.report.page import Bullets, Note, Table

SIGLIP_2 = "google/siglip2-base-patch16-224"


def imagenet(name, checkpoint="", *, images=50_000, **protocol):
  protocol = {"images": images, "classes": 1000, "data": "val", **protocol}
  result = Result({"top1": 0.77, "top5": 0.9}, protocol, errors={"top1": 0.002})
  return Outcome(
    name, name, "ema", {"zero_shot": result}, checkpoint=checkpoint
  )


def blocks(*outcomes, baseline=None):
  return [
    *evaluations.describe_outcomes(outcomes, size=None, baseline=baseline)
  ]


def texts(*outcomes):
  lines = []
  for block in blocks(*outcomes):
    if isinstance(block, Note):
      lines.append(block.text)
    elif isinstance(block, Bullets):
      lines += block.lines
  return lines


def test_a_figure_is_beside_the_row_of_its_checkpoint():
  outcomes = [
    imagenet("mine"),
    imagenet("s2", SIGLIP_2, view="encoder", clean="canonicalize"),
    imagenet("clip", "openai/clip-vit-base-patch16", view="encoder"),
  ]
  table = blocks(*outcomes)[1].rows
  assert table[0][-1] == "published"
  assert table[1][1] == "top1"
  assert table[1][-1] == "s2: 78.2 %\nclip: 68.3 %"
  assert table[2][1] == "top5" and table[2][-1] == ""
  (compared,) = (
    b.rows
    for b in blocks(*outcomes)
    if isinstance(b, Table) and "published" in b.rows[0][3:4]
  )
  assert compared[1] == [
    "ImageNet zero-shot",
    "s2",
    "77.00 ± 0.20 %",
    "78.2 %",
    "\u22121.20",
  ]
  lines = texts(*outcomes)
  assert f"s2 is compared with figures published for {SIGLIP_2}." in lines
  (line,) = [t for t in lines if t.startswith("ImageNet zero-shot, s2")]
  assert "README_siglip2.md" in line
  assert line.endswith("Here view is encoder, not squash_center.")


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
  assert "published" not in blocks(outcome)[1].rows[0]
  assert not any("78.2" in line for line in texts(outcome))


def test_other_data_are_said():
  lines = texts(imagenet("a", SIGLIP_2, images=500))
  assert "ImageNet zero-shot, a: here data val, images 500." in lines


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
  assert [chart.title for chart in drawn] == [
    "ImageNet zero-shot (protocol 1)",
    "ImageNet zero-shot (protocol 2)",
  ]
  assert len({chart.name for chart in drawn}) == 2
  assert "<title>a:" in drawn[0].svg and "<title>b:" not in drawn[0].svg
  assert "<title>b:" in drawn[1].svg and "<title>a:" not in drawn[1].svg


def test_rows_of_other_protocols_are_apart():
  rows = tables.compare(
    [
      imagenet("a", data_hash="1"),
      imagenet("b", data_hash="2"),
      imagenet("c", data_hash="1", options={"view": "center"}),
      imagenet("d", data_hash="1"),
    ],
    split=True,
  )
  values = [(r.label, r.values) for r in rows if r.metric == "top1"]
  assert values == [
    ("top1 (protocol 1)", (77.0, None, None, 77.0)),
    ("top1 (protocol 2)", (None, 77.0, None, None)),
    ("top1 (protocol 3)", (None, None, 77.0, None)),
  ]
