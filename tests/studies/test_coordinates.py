"""The coordinate check of muP: slopes, page, and a real run of two widths."""

import json

import pytest
from trainings import smallest

from mtv_jax.studies import coordinates
from mtv_jax.utils.errors import ConfigError

MODELS = [
  f"w{w}:width={w},heads={w // 16},mlp_dim={2 * w},text.width={w},"
  f"text.heads={w // 16},text.mlp_dim={2 * w}"
  for w in (16, 32, 64)
]


def config_with_mup():
  config = smallest("batch=16", xla_flags="quick")
  config.ema = None
  config.model.mup = config.model.text.mup = dict(base_width=16)
  return config


def test_slopes_are_of_logarithms_over_size(tmp_path, monkeypatch):
  def measure(config, arm, field, steps):
    del config, steps
    mup, width = "model.mup=None" not in arm.overrides, int(arm.name[1:-4])
    assert field == "width" and arm.name.endswith("-all")
    value = width ** (0.1 if mup else 0.8)
    changes = {"image/last": [9.0, value]}
    return coordinates.Coordinates(arm.name, mup, 0, width, changes)

  monkeypatch.setattr(coordinates, "_measure", measure)
  config = config_with_mup()
  files = coordinates.check_coordinates(config, MODELS, tmp_path, seeds=2)
  found = json.loads(files[0].read_text())
  expected = pytest.approx({"muP": 0.1, "standard": 0.8})
  assert (
    found["slopes"] == {"image/last": expected} and len(found["rows"]) == 12
  )
  text = (tmp_path / "report.md").read_text()
  assert "| image/last | +0.10 | +0.80 |" in text
  with pytest.raises(ConfigError, match="differ in no size of the image tower"):
    models = ["a:image_size=16", "b:image_size=24"]
    coordinates.check_coordinates(config, models, tmp_path)
  with pytest.raises(ConfigError, match="with the same models without it: set"):
    coordinates.check_coordinates(smallest(), MODELS, tmp_path)


@pytest.mark.long
def test_two_widths_of_a_real_config(tmp_path):
  models = [MODELS[0], MODELS[2]]
  files = coordinates.check_coordinates(
    config_with_mup(), models, tmp_path, steps=20
  )
  slopes = json.loads(files[0].read_text())["slopes"]
  assert {"image/first", "image/pooled", "text/tokens"} <= {*slopes}
  assert abs(slopes["image/last"]["muP"]) < 0.15
  assert slopes["image/last"]["standard"] > 0.3
