"""Scaling laws against known parameters and SciPy's regression."""

import numpy as np
import pytest
from scipy import optimize, stats

from mtv_jax.report.contrasts import Metric
from mtv_jax.studies.scaling import fit_scaling
from mtv_jax.utils.errors import InputError

TOP1, RMSE = Metric("top1"), Metric("rmse", unit="m", lower=True)
IMAGES = np.geomspace(1e4, 1e6, 6)


def test_intervals_are_those_of_a_linear_regression():
  """Near the fit the law is linear in its parameters."""
  rng = np.random.default_rng(0)
  x = np.geomspace(1e3, 1e7, 16)
  error = 0.1 + 0.4 * (x / 1e5) ** -0.3
  error *= np.exp(0.002 * rng.standard_normal(16))
  fit = fit_scaling(TOP1, {"images": x}, 1 - error)

  def law(log_x, *theta):
    floor, scale, exponent = theta
    return np.log(floor + scale * np.exp(-exponent * log_x))

  log_x = np.log(x / 1e5)
  theta, covariance = optimize.curve_fit(law, log_x, np.log(error), (0.1, 1, 1))
  halves = stats.t.ppf(0.975, 13) * np.sqrt(np.diag(covariance))
  found = list(fit.parameters.values())
  assert [p.value for p in found] == pytest.approx(theta, rel=1e-4)
  widths = [p.high - p.low for p in found]
  assert widths == pytest.approx(2 * halves, rel=0.25)
  fitted = law(log_x, *theta)
  assert fit.residuals == pytest.approx(np.log(error) - fitted, abs=1e-5)
  r2 = 1 - np.var(np.log(error) - fitted) / np.var(np.log(error))
  assert fit.r2 == pytest.approx(r2, abs=1e-5)
  predicted = fit.predict({"images": x})
  assert predicted == pytest.approx(1 - np.exp(fitted), abs=1e-5)
  assert fit.is_complement and fit.is_identifiable


def test_saturating_power_law_recovers_its_parameters():
  values = 0.5 + 2.0 * (IMAGES / 1e5) ** -0.4
  fit = fit_scaling(RMSE, {"images": IMAGES}, values)
  found = {name: p.value for name, p in fit.parameters.items()}
  # IMAGES have the geometric mean 1e5.
  expected = {"floor": 0.5, "coefficient images": 2.0, "exponent images": 0.4}
  assert found == pytest.approx(expected, rel=1e-4)
  assert fit.centres["images"] == pytest.approx(1e5)
  assert fit.formula == "e = e₀ + c (images / images₀)^-a"
  assert fit.predict({"images": np.array([1e5, 1e8])}) == pytest.approx(
    [2.5, 0.5 + 2.0 * 1e3**-0.4], rel=1e-4
  )


def test_law_of_images_and_parameters():
  parameters = np.repeat([1e6, 4e6, 16e6], 3)
  images = np.tile([3e4, 1e5, 1e5**2 / 3e4], 3)
  error = 0.3 + 0.2 * (parameters / 4e6) ** -0.3 + 0.1 * (images / 1e5) ** -0.5
  x = {"parameters": parameters, "images": images}
  fit = fit_scaling(TOP1, x, 1 - error)
  found = {name: p.value for name, p in fit.parameters.items()}
  assert found == pytest.approx(
    {
      "floor": 0.3, "coefficient parameters": 0.2, "coefficient images": 0.1,
      "exponent parameters": 0.3, "exponent images": 0.5,
    },
    rel=1e-3,
  )  # fmt: skip


def test_too_few_points_are_refused():
  x = {"images": IMAGES[:3]}
  fit = fit_scaling(RMSE, x, [3.0, 2.0, 1.5])
  assert not fit.is_identifiable and fit.r2 is None
  assert "3 different points for 3 parameters; at least 4" in fit.note
  # Seeds of one setting are not points.
  x = {"images": np.repeat(IMAGES[:2], 4)}
  fit = fit_scaling(RMSE, x, np.arange(1.0, 9.0))
  assert "2 different points" in fit.note
  fit = fit_scaling(RMSE, {"images": IMAGES}, [2.0, 1.9, 1.8, *[np.nan] * 3])
  assert fit.points == 3 and not fit.is_identifiable
  with pytest.raises(InputError, match="lacks parameters: not identifiable"):
    fit.predict({"images": IMAGES})


def test_what_the_points_cannot_tell_is_refused():
  # Nothing changes: floor and coefficient are one number.
  fit = fit_scaling(TOP1, {"images": IMAGES}, np.full(6, 0.3))
  assert not fit.is_identifiable and "not identifiable" in fit.note
  x = {"images": IMAGES, "parameters": np.full(6, 4e6)}
  fit = fit_scaling(TOP1, x, np.linspace(0.2, 0.5, 6))
  assert fit.note == "not identifiable: all points have the same parameters"
  # An error that grows with the images.
  x = {"images": np.tile(IMAGES, 2), "parameters": np.repeat([1e6, 9e6], 6)}
  error = 0.1 * (x["images"] / 1e5) ** 0.1
  error += 0.2 * (x["parameters"] / 3e6) ** -0.3
  fit = fit_scaling(TOP1, x, 1 - error)
  assert fit.note.endswith("of images runs to 0, the bound of the search")
  assert "c₁ (images / images₀)^-a₁ + c₂ (parameters" in fit.formula
  # Two variables that grow together.
  x = {"images": IMAGES, "parameters": IMAGES * 10}
  error = 0.3 + 0.2 * (IMAGES / 1e5) ** -0.3
  fit = fit_scaling(TOP1, x, 1 - error)
  assert not fit.is_identifiable


def test_metrics_that_are_no_errors_are_refused():
  with pytest.raises(InputError, match="neither a fraction nor a metric"):
    fit_scaling(Metric("bleu", unit=""), {"images": IMAGES}, IMAGES)
  # An accuracy of 1 has no logarithm of its error.
  fit = fit_scaling(TOP1, {"images": IMAGES}, np.linspace(0.5, 1.0, 6))
  assert fit.note == "not identifiable: 1 of 6 errors are not above 0"


def test_seeds_of_a_size_are_no_sizes():
  """What the law misses at a size is shared by its seeds."""
  rng, found = np.random.default_rng(0), []
  error = 0.3 + 0.2 * (IMAGES / 1e5) ** -0.4
  error *= np.exp(0.004 * rng.standard_normal(6))
  for seeds in (1, 8):
    x = np.repeat(IMAGES, seeds)
    found.append(fit_scaling(RMSE, {"images": x}, np.repeat(error, seeds)))
  one, eight = (fit.parameters["exponent images"] for fit in found)
  assert eight.high - eight.low == pytest.approx(one.high - one.low, rel=0.3)


def test_a_wide_interval_identifies_no_exponent():
  rng = np.random.default_rng(0)
  error = 0.3 + 0.2 * (IMAGES / 1e5) ** -0.3
  error *= np.exp(0.05 * rng.standard_normal(6))
  fit = fit_scaling(RMSE, {"images": IMAGES}, error)
  assert not fit.is_identifiable
  assert "more than a factor of 4; train more sizes or" in fit.note
