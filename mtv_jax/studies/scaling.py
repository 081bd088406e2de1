"""Scaling laws: fits of an error against images and parameters.

With x_v the images or the parameters, relative to their geometric mean over the
points, the saturating power law is

  e = e_0 + sum over v of c_v x_v^-a_v

With two variables it is equation 2 of Hoffmann et al. 2022. c_v is the
reducible error at the geometric mean. The fit is least squares in log e;
Hoffmann et al., with more points, use a Huber loss of these residuals.

An exponent counts as identified if the ends of its interval differ by at most a
factor of `IDENTIFIED` and are off the bounds of the search (our choice);
otherwise the law has no parameters, no curve and no predictions.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from mtv_jax.report import charts
from mtv_jax.report.charts import Chart, Series
from mtv_jax.report.contrasts import (
  LEVEL,
  NOT_COMPARABLE,
  ArmMeasurements,
  Metric,
)
from mtv_jax.report.tables import EMPTY
from mtv_jax.studies.statistics import summarise_arm
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import file_name

# Initial values of the search; published exponents are 0.05 to 0.5.
_INITIAL_EXPONENTS, _INITIAL_FLOORS = (0.1, 0.4, 1.0), (0.1, 0.5, 0.9)
_MAX_EXPONENT = 5.0
# Maximum function evaluations of one search; most searches need 10.
_MAX_EVALUATIONS = 100
_RESAMPLES = 100  # Bootstrap fits for the intervals.
IDENTIFIED = 4.0  # Largest ratio of the ends of an exponent's interval.
_PERCENTILES = 50 * (1 - LEVEL), 50 * (1 + LEVEL)  # Ends of an interval.
# Smallest singular value of a Jacobian whose columns have unit length.
_MIN_SINGULAR = 1e-6


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A fitted parameter with its 95 % bootstrap interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class ScalingFit:
  """A scaling law of one metric; the module docstring gives its form."""

  metric: str
  formula: str
  points: int
  # Geometric mean of each variable; x is relative to it.
  centres: dict[str, float]
  is_complement: bool  # whether e is 1 - metric, else the metric
  note: str  # why the fit is missing, or ""
  # "floor", "coefficient VARIABLE", "exponent VARIABLE".
  # Empty if they are not identifiable.
  parameters: dict[str, Parameter] = dataclasses.field(default_factory=dict)
  r2: float | None = None  # in log e
  residuals: tuple[float, ...] = ()  # log e minus the fit, by point
  # R bootstrap fits: parameters [R, P], and residuals in log e of one more size
  # [R].
  resampled_params: Any = dataclasses.field(
    default=None, compare=False, repr=False
  )
  noise: Any = dataclasses.field(default=None, compare=False, repr=False)

  @property
  def is_identifiable(self) -> bool:
    """Whether the parameters could be fitted."""
    return bool(self.parameters)

  def predict(
    self, x: Mapping[str, Float[np.ndarray, " m"]]
  ) -> Float[np.ndarray, " m"]:
    """Predicted metric values at m points."""
    if not self.is_identifiable:
      raise InputError(
        f"the fit of {self.metric} lacks parameters: {self.note}"
      )
    error = self._error([p.value for p in self.parameters.values()], x)
    return 1.0 - error if self.is_complement else error

  def predict_interval(self, x: Mapping[str, float | int]) -> Parameter:
    """The metric of one more size, with its 95 % prediction interval.

    Percentiles over bootstrap fits, each with a resampled residual of a size.
    """
    point = {name: np.array([value], float) for name, value in x.items()}
    (value,) = self.predict(point)
    error = self._error(self.resampled_params.T[:, :, None], point)[:, 0]
    ends = np.percentile(error * np.exp(self.noise), _PERCENTILES)
    low, high = sorted(1.0 - ends) if self.is_complement else ends
    return Parameter(*map(float, (value, low, high)))

  def _error(self, theta: Any, x: Mapping[str, Any]) -> Any:
    """e at m points, for parameters [P] or [P, R, 1]."""
    floor, *params = theta
    count = len(self.centres)
    error = floor + np.zeros(len(next(iter(x.values()))))
    for i, (name, centre) in enumerate(self.centres.items()):
      relative = np.asarray(x[name], np.float64) / centre
      error = error + params[i] * relative ** -params[count + i]
    return error


def fit_scaling(
  metric: Metric,
  x: Mapping[str, Sequence[float | int] | np.ndarray],
  values: Sequence[float | int] | np.ndarray,
  obstacle: str = "",
) -> ScalingFit:
  """Fits the scaling law to n points; drops non-finite values.

  With an `obstacle`, returns a fit without parameters and with this note.

  Intervals are percentiles over fits to resampled residuals, see
  `_residual_sampler`. For a linear law this yields the t interval.

  e is the metric if lower is better, else 1 - metric.
  """
  if not metric.lower and metric.unit != "%":
    raise InputError(
      f"{metric.name} is neither a fraction nor a metric where lower is better;"
      " a scaling law needs an error metric"
    )
  is_finite = np.isfinite(np.asarray(values, np.float64))
  names = list(x)
  points = np.array([x[name] for name in names], np.float64)[:, is_finite]
  error = np.asarray(values, np.float64)[is_finite]
  error = error if metric.lower else 1.0 - error
  if (points <= 0).any():
    raise InputError(
      f"the scaling law of {metric.name} needs images and parameters above 0"
    )
  subscripts = [""] if len(names) == 1 else ["₁", "₂"]
  terms = [
    f"c{subscript} ({name} / {name}₀)^-a{subscript}"
    for name, subscript in zip(names, subscripts, strict=True)
  ]
  centres = np.exp(np.log(points).sum(axis=1) / max(len(error), 1))
  fit = ScalingFit(
    metric=metric.name,
    formula=" + ".join(["e = e₀", *terms]),
    points=len(error),
    centres=dict(zip(names, map(float, centres), strict=True)),
    is_complement=not metric.lower,
    note=obstacle or _find_obstacle(names, points, error),
  )
  if fit.note:
    return fit
  scaled, target = np.log(points / centres[:, None]), np.log(error)
  theta = _fit(scaled, target)
  if note := _find_degeneracy(names, theta, scaled):
    return dataclasses.replace(fit, note=note)
  fitted = _predict_log(theta, scaled)
  residuals = target - fitted
  draw = _residual_sampler(points, residuals, len(theta))
  noise = np.stack([draw() for _ in range(_RESAMPLES)])
  resampled_params = np.stack([_fit(scaled, fitted + n, theta) for n in noise])
  for logarithms in (theta, resampled_params):
    scales = logarithms[..., : len(names) + 1]
    scales[...] = np.exp(scales)
  ends = np.percentile(resampled_params, _PERCENTILES, axis=0)
  if note := _find_wide_exponent(names, ends[:, -len(names) :]):
    return dataclasses.replace(fit, note=note)
  rows = zip(_label_params(names), theta.tolist(), *ends.tolist(), strict=True)
  spread = np.sum((target - target.mean()) ** 2)
  return dataclasses.replace(
    fit,
    parameters={label: Parameter(*row) for label, *row in rows},
    r2=float(1 - np.sum(residuals**2) / spread) if spread > 0 else None,
    residuals=tuple(map(float, residuals)),
    resampled_params=resampled_params,
    noise=noise[::-1, 0],  # Reversed: not the noise behind the same fit.
  )


def _label_params(names: Sequence[str]) -> list[str]:
  """Names of the parameters [P] of a law."""
  kinds = ("coefficient", "exponent")
  return ["floor", *(f"{kind} {name}" for kind in kinds for name in names)]


def _residual_sampler(
  points: np.ndarray, residuals: np.ndarray, parameters: int
) -> Callable[[], np.ndarray]:
  """Returns a function that draws residuals [N]: one per size plus one per run.

  Runs of a size share the law's misfit, so sizes, not runs, are the
  sample. The residuals of sizes are scaled by sqrt(S / (S - parameters)) for S
  sizes, which corrects their shrinkage by the fit, and by the ratio of
  Student's t to the normal quantile; the runs' residuals by sqrt(N / (N - S)).
  """
  sizes, group = np.unique(points, axis=1, return_inverse=True)
  group, count, total = group.ravel(), sizes.shape[1], len(residuals)
  size_residuals = np.bincount(group, residuals) / np.bincount(group)
  run_residuals = residuals - size_residuals[group]
  degrees, quantile = count - parameters, (1 + LEVEL) / 2
  widening = special.stdtrit(degrees, quantile) / special.ndtri(quantile)
  size_residuals = (
    (size_residuals - size_residuals.mean())
    * widening
    * np.sqrt(count / degrees)
  )
  run_residuals = run_residuals * np.sqrt(total / max(total - count, 1))
  rng = np.random.default_rng(0)

  def draw():
    noise = rng.choice(size_residuals, count)[group]
    return noise if total == count else noise + rng.choice(run_residuals, total)

  return draw


def _find_wide_exponent(names: Sequence[str], ends: np.ndarray) -> str:
  """Why the intervals [2, V] don't identify the exponents, or ""."""
  for name, low, high in zip(names, *ends, strict=True):
    if low < 1e-3 or high > _MAX_EXPONENT - 1e-3 or high > IDENTIFIED * low:
      return (
        f"not identifiable: the exponent of {name} is {low:.3g} to {high:.3g} "
        f"(95 %), more than a factor of {IDENTIFIED:g}; train more sizes or "
        "seeds"
      )
  return ""


def _find_obstacle(
  names: Sequence[str], points: np.ndarray, error: np.ndarray
) -> str:
  """Why points [V, N] and errors [N] can't determine the parameters, or ""."""
  if count := int((error <= 0).sum()):
    return f"not identifiable: {count} of {len(error)} errors are not above 0"
  distinct = len(np.unique(points, axis=1).T) if points.size else 0
  count = 2 * len(names) + 1
  if distinct <= count:
    return (
      f"not identifiable: {distinct} different points for {count} "
      f"parameters; at least {count + 1} are needed"
    )
  for name, row in zip(names, points, strict=True):
    if len(np.unique(row)) < 2:
      return f"not identifiable: all points have the same {name}"
  return ""


# The law for log variables x [V, N]; theta [P] is [log floor, log coefficients,
# exponents]. Hot functions: shapes in docstrings avoid runtime checks.
def _predict_log(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Log e [N]."""
  return np.logaddexp.reduce(_log_terms(theta, x), axis=0)


def _jacobian(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Its Jacobian [N, P]: each term's share of e, and -x times the share."""
  terms = _log_terms(theta, x)
  shares = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
  return np.concatenate([shares, -x * shares[1:]]).T


def _log_terms(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
  scales, exponents = theta[1:].reshape(2, len(x), 1)
  floors = np.full((1, x.shape[1]), theta[0])
  return np.concatenate([floors, scales - exponents * x])  # [terms, N]


def _fit(
  x: np.ndarray, target: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
  """The least-squares theta [P] for log errors [N]."""
  variables = len(x)
  # The floor: from a millionth of the smallest error to the largest error.
  min_log, max_log = target.min() - np.log(1e6), target.max()
  scales = [(min_log, max_log + np.log(1e6))] * variables
  # Exponents are positive: a growing term would be confounded with the floor.
  bounds = [(min_log, max_log), *scales, *[(0.0, _MAX_EXPONENT)] * variables]
  low, high = np.array(bounds).T
  starts = [] if start is None else [start]
  for share, exponent in itertools.product(_INITIAL_FLOORS, _INITIAL_EXPONENTS):
    if start is None:
      term = target.mean() + np.log((1 - share) / variables)
      params = [term] * variables + [exponent] * variables
      starts.append(np.array([target.mean() + np.log(share), *params]))
  fits = [
    optimize.least_squares(
      lambda theta: _predict_log(theta, x) - target,
      np.clip(theta, low + 1e-9, high - 1e-9),
      lambda theta: _jacobian(theta, x),
      bounds=(low, high),
      x_scale="jac",
      max_nfev=_MAX_EVALUATIONS,
      ftol=1e-7 if start is not None else 1e-12,
    )
    for theta in starts
  ]
  return min(fits, key=lambda fit: fit.cost).x


def _find_degeneracy(
  names: Sequence[str], theta: np.ndarray, x: np.ndarray
) -> str:
  """Why a fit does not identify its parameters, or ""."""
  for name, exponent in zip(names, theta[-len(names) :], strict=True):
    if not 1e-3 < exponent < _MAX_EXPONENT - 1e-3:
      bound = _MAX_EXPONENT if exponent > 1e-3 else 0.0
      return (
        f"not identifiable: the exponent of {name} runs to {bound:g}, the "
        "bound of the search"
      )
  jacobian = _jacobian(theta, x)
  norms = np.linalg.norm(jacobian, axis=0)
  # Ignore the vanishing derivative of a floor near 0: it is not an ambiguity.
  unit_columns = (jacobian / norms.clip(1e-300))[:, norms > 1e-4]
  if np.linalg.svd(unit_columns, compute_uv=False)[-1] < _MIN_SINGULAR:
    return "not identifiable: the points don't determine all parameters"
  return ""


def fit_metrics(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  sizes: Mapping[str, Mapping[str, Any]],
) -> dict[str, ScalingFit]:
  """Fits a law to the runs' values of each metric that is an error or fraction.

  `sizes` has `images` and `parameters` by arm; a constant variable is dropped,
  and a metric without a variable has no fit.
  """
  fits = {}
  for metric in metrics:
    seeds = {arm: data.seeds(arm, metric.name) for arm in data.values}
    points = [
      (sizes[arm], data.values[arm][seed][metric.name])
      for arm in data.values
      for seed in seeds[arm]
    ]
    if not points or not (metric.lower or metric.unit == "%"):
      continue
    names = [
      name
      for name in ("images", "parameters")
      if len({size.get(name) for size, _ in points}) > 1
    ]
    x = {name: [float(size[name]) for size, _ in points] for name in names}
    y = [value for _, value in points]
    if names:
      is_alike = data.is_measured_alike(metric, seeds)
      obstacle = "" if is_alike else NOT_COMPARABLE
      fits[metric.name] = fit_scaling(metric, x, y, obstacle)
  return fits


def draw_scaling(
  data: ArmMeasurements,
  metrics: Sequence[Metric],
  sizes: Mapping[str, Mapping[str, Any]],
  fits: Mapping[str, ScalingFit],
  x_label: str = "distinct images",
) -> list[Chart]:
  """A chart of each metric over images, with a curve per model of `sizes`."""
  models = collections.defaultdict(list)
  for arm in data.values:
    models[sizes[arm]["model"]].append(arm)
  line_charts = []
  for metric in metrics:
    lines, fit = [], fits.get(metric.name)
    for colour, (model, arms) in enumerate(models.items()):
      arms = sorted(arms, key=lambda a: sizes[a]["images"])
      rows = [
        (sizes[arm]["images"], summarise_arm(data, metric, arm)) for arm in arms
      ]
      series = charts.mean_series(model, rows, colour, "dots")
      if not (points := series.points):
        continue
      lines.append(series)
      if fit is not None and fit.is_identifiable and len(points) > 1:
        x = np.geomspace(points[0][0], points[-1][0], 40)
        size = np.full(40, float(sizes[arms[0]].get("parameters", 1)))
        inputs = {"images": x, "parameters": size}
        y = fit.predict({name: inputs[name] for name in fit.centres})
        y = (metric.scale * y).tolist()
        curve = [*zip(x.tolist(), y, strict=True)]
        lines.append(Series(f"fit, {model}", curve, colour, style="dashed"))
    if lines:
      line_charts.append(
        charts.line_chart(
          metric.label,
          lines,
          name=file_name("scaling", metric.name),
          x_label=x_label,
          log_x=True,
          chance=rows[0][1].chance,
        )
      )
  return line_charts


def fits_table(fits: Mapping[str, ScalingFit]) -> list[list[str]]:
  """Fitted parameters with intervals: a header, then a row per metric."""
  names = list(
    dict.fromkeys(n for fit in fits.values() for n in fit.parameters)
  )
  rows = [["metric", *names, "R²", "points"]]
  for metric, fit in fits.items():
    cells = [fit.parameters.get(name) for name in names]
    r2 = EMPTY if fit.r2 is None else f"{fit.r2:.3f}"
    texts = [EMPTY if p is None else _format_parameter(p) for p in cells]
    rows.append([metric, *texts, r2, str(fit.points)])
  return rows


def _format_parameter(parameter: Parameter) -> str:
  value, *ends = (
    "0" if abs(v) < 1e-4 else f"{v:.3g}"
    for v in (parameter.value, parameter.low, parameter.high)
  )
  return f"{value}\n[{', '.join(ends)}]"


def format_exponents(parameters: Mapping[str, Mapping[str, float]]) -> str:
  """The exponents of a law's parameters as text, each with its interval."""
  return ", ".join(
    f"{name.removeprefix('exponent ')} {_format_parameter(Parameter(**values))}"
    for name, values in parameters.items()
    if name.startswith("exponent ")
  )


def describe_laws(fits: Mapping[str, ScalingFit]) -> list[str]:
  """Lists the distinct formulas of the fits, with their metrics."""
  lines = {}
  for metric, fit in fits.items():
    error = "1 − metric" if fit.is_complement else "metric"
    centres = ", ".join(f"{k}₀ = {v:,.0f}" for k, v in fit.centres.items())
    note = f"; {fit.note}" if fit.note else ""
    line = f"{fit.formula}; e = {error}; {centres}{note}"
    lines.setdefault(line, []).append(metric)
  return [f"{', '.join(names)}: {line}" for line, names in lines.items()]
