"""JSON of results, and options that metrics depend on."""

import dataclasses
import json
import math

import numpy as np
import pytest
from outcome_samples import DEPTH

from mtv_jax.evals.core import base, results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.utils.errors import InputError


def outcome(name, **fields):
  depth = dataclasses.replace(
    DEPTH, metrics=dict(DEPTH.metrics), protocol=dict(DEPTH.protocol), sheets={}
  )
  return Outcome(name, name, "student", {"depth": depth}, **fields)


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


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"annotations": []}', r"\['annotations'\]; expected res"),
    ('{"evals": {}}', "can't be read.*encoder"),
    ("x", "is not JSON"),
  ],
)
def test_json_without_results_is_rejected(tmp_path, text, message):
  path = tmp_path / "x.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    results.read(path)


def test_resamples_of_other_shapes_are_refused(tmp_path):
  for array in np.float32(1), np.zeros(1), np.array(["a", "b"]):
    np.savez(tmp_path / "x.npz", top1=array)
    with pytest.raises(InputError, match=r"x.npz can't be read \(top1 is"):
      results.read_resamples(tmp_path / "x.json")


def test_changed_options_are_those_that_metrics_depend_on():
  def changed(kind, **options):
    return base.build_evaluator(kind, options).changed_options()

  assert changed("zero_shot", count=7, batch_size=3) == {}
  assert changed("zero_shot", view="center") == {"view": "center"}
  semantic = changed("semantic_correspondence", image_mean="imagenet", count=9)
  assert semantic == {"image_mean": "imagenet"}
  # The batch of a training matters.
  assert changed("depth_probe", batch_size=3) == {"batch_size": 3}
