"""muP: slopes of the coordinate check, losses over rates, and real runs."""

import json
import math

import pytest
from trainings import smallest

from mtv_jax.studies import coordinates, learning_rates
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


def test_rates_continue_and_name_the_best(tmp_path, monkeypatch):
  trained = []

  def train(config, steps):
    assert steps == 20
    width, rate = config.model.width, config.optim.lr
    trained.append((width, config.model.mup is not None, rate))
    best = 1e-2 if config.model.mup else 1e-2 * 16 / width
    return None if rate > 0.5 else abs(math.log(rate / best))

  monkeypatch.setattr(learning_rates, "_train", train)
  options = dict(models=MODELS, output=tmp_path, steps=20)
  config = config_with_mup()
  learning_rates.compare_rates((1e-2,), config, **options)
  rates = (2.5e-3, 5e-3, 1e-2, 1.0)
  learning_rates.compare_rates(rates, config, **options)
  assert len(trained) == len({*trained}) == 24
  text = (tmp_path / "report.md").read_text()
  assert "| w64 | 64 | muP | 1.386 | 0.693 | 0.000 | - | 0.01 |" in text
  assert "| w64 | 64 | standard | 0.000 | 0.693 | 1.386 | - | 0.0025 |" in text
  config.optim.lr = 0.5  # Each run has one of `rates`.
  learning_rates.compare_rates((1e-2,), config, **options, seeds=2)
  assert len(trained) == 30  # Another seed of three models.
  wider = MODELS[0].replace("mlp_dim=32", "mlp_dim=48")
  with pytest.raises(ConfigError, match="'w16' of other settings"):
    learning_rates.compare_rates(
      rates, config, **options | {"models": [wider, *MODELS[1:]]}
    )
  config.optim.b2 = 0.5
  with pytest.raises(ConfigError, match="another config or number of steps"):
    learning_rates.compare_rates(rates, config, **options)
  (tmp_path / learning_rates.FILE).write_text("{")
  with pytest.raises(ConfigError, match="is damaged"):
    learning_rates.compare_rates(rates, config, **options)


def test_rates_are_compared_on_the_same_seeds():
  rows = [
    learning_rates.RateResult("w", [], True, seed, 8, rate, loss)
    for seed, rate, loss in ((3, 0.01, 1.0), (3, 0.02, 2.0), (4, 0.01, 9.0))
  ]
  means = learning_rates._average_seeds(rows, (0.01, 0.02, 0.04))
  assert means == {0.01: 1.0, 0.02: 2.0, 0.04: None}
  # A stopped study may lack a model without muP.
  _, table, *_ = learning_rates._describe_page(rows, "width", 20)
  assert table.rows[1:] == [["w", "8", "muP", "1.000", "2.000", "0.01"]]


@pytest.mark.slow
def test_a_rate_of_a_real_config(tmp_path):
  options = dict(models=MODELS[:2], output=tmp_path, steps=20)
  learning_rates.compare_rates((1e-3,), config_with_mup(), **options)
  found = json.loads((tmp_path / learning_rates.FILE).read_text())
  losses = {(r["size"], r["mup"], r["rate"]): r["loss"] for r in found["rows"]}
  assert losses[16, True, 1e-3] == pytest.approx(losses[16, False, 1e-3])
  assert losses[32, True, 1e-3] != losses[32, False, 1e-3]
  assert 0 < losses[32, True, 1e-3] < 5


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
