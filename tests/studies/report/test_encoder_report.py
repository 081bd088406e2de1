"""The report of several encoders: differences, and its layout."""

import dataclasses

import numpy as np
import pytest
from page_checks import Outline, check_layout

from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.studies.report import encoder_report
from mtv_jax.utils.errors import ConfigError

SIGLIP = "google/siglip-base-patch16-224"


def outcome(name, hits, checkpoint=""):
  """Of k-NN on n items, with a sheet."""
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
def outcomes():
  rng = np.random.default_rng(0)
  hard = rng.random(400)
  return [
    outcome("first", hard < 0.6, SIGLIP),
    # Right on the same items and on 5 % more.
    outcome("second", hard < 0.65),
    outcome("a third one with a long name", hard < 0.601),
  ]


def test_differences_are_paired_by_item(outcomes):
  compared, metrics = encoder_report.compare_encoders(outcomes, "first")
  assert [m.name for m in metrics] == ["knn/top1_k20", "zero_shot/top1"]
  by = {(c.metric, c.arm): c for c in compared}
  one = by["knn/top1_k20", "second"]
  hits = [np.asarray(o.results["knn"].metrics["top1_k20"]) for o in outcomes]
  assert one.difference == pytest.approx(hits[1] - hits[0])
  assert one.items == "resamples" and one.verdict == "better"
  # Far narrower than of independent errors: sqrt(d (1 - d) / n).
  error = np.sqrt(one.difference * (1 - one.difference) / 400)
  assert one.item_high - one.item_low == pytest.approx(3.92 * error, rel=0.15)
  assert by["zero_shot/top1", "second"].items == "errors"


def test_results_of_another_protocol_have_no_difference(outcomes):
  first, second, _ = outcomes
  knn = second.results["knn"]
  other = dataclasses.replace(knn, protocol={**knn.protocol, "options": "x"})
  second = dataclasses.replace(second, results={**second.results, "knn": other})
  compared, _ = encoder_report.compare_encoders([first, second], "first")
  assert [c.verdict for c in compared] == ["missing", "not distinguishable"]


def test_an_unknown_baseline_raises(outcomes, tmp_path):
  with pytest.raises(ConfigError, match="Did you mean 'first'"):
    encoder_report.write_encoders(outcomes, tmp_path, baseline="frist")
  assert [*tmp_path.iterdir()] == []


def test_files_and_sections(outcomes, tmp_path):
  files = encoder_report.write_encoders(outcomes, tmp_path, baseline="second")
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
  for name in ("first", "second", "a third one with a long name"):
    assert f"neighbours, {name}" in text


def test_page_in_a_browser(outcomes, tmp_path, browser):
  encoder_report.write_encoders(outcomes, tmp_path, baseline="first")
  for width, dark in ((1280, False), (390, False), (390, True)):
    check_layout(browser, tmp_path / "report.html", width, dark=dark)
