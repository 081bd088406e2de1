"""Interference of objectives: estimates from gradients, and their tables.

A gradient on k batches is signal plus noise: g = mu + e. Inner products of
disjoint sets of batches estimate inner products of mu, noise-free. From them,

  reliability  |mu|^2 / E|g|^2, the expected cosine of one objective's gradient
               on two disjoint sets (split-half reliability)
  cosine       <mu_i, mu_j> / (|mu_i| |mu_j|), the cosine of two gradients
               corrected for attenuation by sqrt(rel_i rel_j) (Spearman 1904)
  noise        the cosine of e_i and e_j on the same batches

A mean over m times as many batches has reliability m r / (1 + (m - 1) r)
(Spearman 1910, Brown 1910). Intervals are 95 %, by the jackknife over sets.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from mtv_jax.report import page, tables
from mtv_jax.report.run_folders import RunRecord

ENCODER = "encoder"  # All blocks together.
_LEVEL = 0.95

_NOTE = (
  "Reliability r is the expected cosine of an objective's encoder gradient on "
  "two disjoint sets of batches; objectives in full agreement have a cosine of "
  "sqrt(r1 r2) on different sets. “needed” is the number of batches whose mean "
  "reaches the required reliability. “cosine” is of expected gradients without "
  "the noise of batches (“noise”: its cosine on the same batch), and can't be "
  "told if the mean over half of the batches is less reliable than required. "
  "Brackets are 95 % intervals."
)
_TRANSFER_NOTE = (
  "Changes of losses on other batches by steps of equal length along mean "
  "gradients, in percent. A loss falls by slope minus curvature: a negative "
  "slope is a conflict, a positive curvature is not. Controls are each "
  "gradient's entries, shuffled within blocks, and a random direction."
)


@dataclasses.dataclass(frozen=True)
class Interval:
  """Values with their 95 % intervals; NaN where undefined."""

  value: np.ndarray | np.floating
  low: np.ndarray | np.floating
  high: np.ndarray | np.floating

  @classmethod
  def from_error(cls, value: Any, error: Any, degrees: int) -> Interval:
    """Student's t interval around a value with a standard error."""
    half = special.stdtrit(degrees, (1 + _LEVEL) / 2) * error
    return cls(np.asarray(value), value - half, value + half)

  @classmethod
  def of_mean(cls, samples: np.ndarray) -> Interval:
    """The mean of independent samples, over the first axis."""
    n = len(samples)
    error = samples.std(axis=0, ddof=1) / np.sqrt(n)
    return cls.from_error(samples.mean(axis=0), error, n - 1)

  def __iter__(self) -> Iterator[np.ndarray]:
    return iter((self.value, self.low, self.high))

  def __getitem__(self, index: Any) -> Interval:
    return Interval(*(x[index] for x in self))

  def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Applies a monotone function; a decreasing one swaps the ends."""
    value, *ends = map(function, self)
    return Interval(value, np.minimum(*ends), np.maximum(*ends))

  def to_dict(self) -> dict[str, Any]:
    """Nested lists; None for values that are not finite."""
    return {k: to_lists(v) for k, v in vars(self).items()}

  @classmethod
  def from_dict(cls, content: Mapping[str, Any]) -> Interval:
    keys = ("value", "low", "high")
    return cls(*(np.array(content[key], float) for key in keys))


def to_lists(values: np.ndarray) -> Any:
  """Nested lists; None for values that are not finite."""
  return np.where(np.isfinite(values), values.astype(object), None).tolist()


class GradientMoments(NamedTuple):
  """Mean inner products of O gradients on B blocks and the encoder.

  `across` different sets of batches and `within` one set, `[O, O, B + 1]`;
  `replicates` leave out one of S sets each, `[S, O, O, B + 1]`.
  """

  across: np.ndarray
  within: np.ndarray
  replicates: GradientMoments | None = None

  @classmethod
  def of_sets(cls, products: Float[np.ndarray, "s o s o b"]) -> GradientMoments:
    """Averages inner products of mean gradients on S disjoint sets."""
    sets = range(len(products))
    left_out = [np.delete(np.delete(products, s, 0), s, 2) for s in sets]
    parts = [_average_products(p) for p in left_out]
    replicates = cls(*map(np.stack, zip(*parts, strict=True)))
    return cls(*_average_products(products), replicates)

  @classmethod
  def of_halves(
    cls, products: Float[np.ndarray, "t 2 o 2 o b"]
  ) -> GradientMoments:
    """Averages inner products of the gradients of two halves of T batches."""
    parts = map(np.stack, zip(*map(_average_products, products), strict=True))
    across, within = parts
    left_out = ((x.sum(0) - x) / (len(x) - 1) for x in (across, within))
    return cls(across.mean(0), within.mean(0), cls(*left_out))

  def estimate(
    self, function: Callable[[GradientMoments], np.ndarray]
  ) -> Interval:
    """Estimates a function of the moments, with a jackknife interval."""
    parts = function(self.replicates)
    n = len(parts)
    error = np.sqrt((n - 1) * parts.var(axis=0))
    return Interval.from_error(function(self), error, n - 1)


def _average_products(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means over pairs of different and of equal sets, `[O, O, B + 1]`."""
  sets = len(products)
  total = products.sum(axis=(0, 2), dtype=float)
  within = np.einsum("sisjb->ijb", products.astype(float))
  across = (total - within) / (sets * (sets - 1))
  return _add_encoder(across), _add_encoder(within / sets)


def _add_encoder(products: np.ndarray) -> np.ndarray:
  """Appends the sum over blocks: [..., B] -> [..., B + 1]."""
  return np.concatenate([products, products.sum(-1, keepdims=True)], axis=-1)


def reliability(moments: GradientMoments) -> Float[np.ndarray, "*s o b"]:
  """Reliability by objective and block; NaN without a gradient."""
  return _divide(_squared_norms(moments.across), _squared_norms(moments.within))


def corrected_cosines(
  moments: GradientMoments,
) -> Float[np.ndarray, "*s o o b"]:
  """Cosines of expected gradients; NaN without a positive signal."""
  return _normalize(moments.across)


def noise_cosines(moments: GradientMoments) -> Float[np.ndarray, "*s o o b"]:
  """Cosines of the noise of two objectives on the same batches."""
  return _normalize(moments.within - moments.across)


def _squared_norms(products: np.ndarray) -> np.ndarray:
  """Squared norms [..., O, B] of products [..., O, O, B]."""
  return np.einsum("...iib->...ib", products)


def _normalize(products: np.ndarray) -> np.ndarray:
  norms = np.sqrt(np.maximum(_squared_norms(products), 0))
  return _divide(products, norms[..., :, None, :] * norms[..., None, :, :])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def extrapolate(factor: int | float) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a map from reliability to its value for `factor` x the batches."""

  def reliability_of_means(r):
    r = np.maximum(r, 0)
    return factor * r / (1 + (factor - 1) * r)

  return reliability_of_means


def batches_needed(
  batches: int | float, target: float
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a map from the reliability of `batches` to the number needed."""

  def count_needed(r):
    r = np.clip(r, 0, 1)
    odds = np.divide(1 - r, r, out=np.full_like(r, np.inf), where=r > 0)
    return np.where(np.isnan(r), r, batches * odds * target / (1 - target))

  return count_needed


def average_known(values: np.ndarray) -> np.ndarray:
  """Mean over the first axis that ignores NaN; NaN where all are NaN."""
  is_known = ~np.isnan(values)
  return _divide(np.where(is_known, values, 0).sum(0), is_known.sum(0))


def describe_checkpoints(
  runs: Sequence[RunRecord],
) -> Iterator[page.PageBlock]:
  """Measurements of `mtv-jax interference`, if there are any."""
  measurements = [(run, m) for run in runs for m in run.checkpoint_interference]
  if measurements:
    yield page.Heading("Gradients at checkpoints")
    yield page.Note(_NOTE)
    yield page.Note(_TRANSFER_NOTE)
  for run, m in measurements:
    prefix = f"{run.name}, " if len(runs) > 1 else ""
    yield page.Heading(f"{prefix}step {m['step']:,}", level=3)
    yield from describe_measurement(m)


def describe_measurement(m: Mapping[str, Any]) -> Iterator[page.PageBlock]:
  """Tables of a measurement; transfer is collapsed."""
  objectives, whole_encoder = m["objectives"], (..., -1)
  columns = {
    _name_batches(row["batches"]): Interval.from_dict(row)[whole_encoder]
    for row in m["reliability"]
  }
  for head, key in (
    (f"{m['batches'] // 2} (extrapolated)", "mean_reliability"),
    ("needed", "batches_needed"),
  ):
    columns[head] = Interval.from_dict(m[key])[whole_encoder]
  yield page.Table(_estimate_table("reliability", objectives, columns), 1)
  first, second = np.triu_indices(len(objectives), 1)
  pairs = [", ".join(p) for p in itertools.combinations(objectives, 2)]
  columns = {
    head: Interval.from_dict(m[key])[first, second, -1]
    for head, key in (("cosine", "cosines"), ("noise", "noise_cosines"))
  }
  table = _estimate_table("pair", pairs, columns)
  told = np.array(m["told"])[whole_encoder]
  for row, is_told in zip(table[1:], told[first] & told[second], strict=True):
    row[1] = row[1] if is_told else "can't be told"
  if pairs:
    yield page.Table(table, 1)
  for part in ("slope", "curvature", "fall") if m.get("transfer") else ():
    changes = Interval.from_dict(m["transfer"][part]).map(lambda x: 100 * x)
    columns = {name: changes[:, j] for j, name in enumerate(objectives)}
    directions = m["transfer"]["directions"]
    table = page.Table(_estimate_table("along", directions, columns), 1)
    yield page.Details(f"{part.capitalize()} of losses (%)", [table])


def _name_batches(count: int | float) -> str:
  if count < 1:
    return "half a batch"
  return "1 batch" if count == 1 else f"{count} batches"


def _estimate_table(
  corner: str, rows: Sequence[str], columns: Mapping[str, Interval]
) -> list[list[str]]:
  """Values with intervals: a header, then a row for each name."""
  table = [[corner, *columns]]
  for i, name in enumerate(rows):
    table.append([name, *(_format_estimate(e[i]) for e in columns.values())])
  return table


def _format_estimate(estimate: Interval) -> str:
  """Value and interval; a dash where undefined."""
  texts = [
    f"{x:.{0 if abs(x) >= 10 else 2}f}".replace("-", "−")
    if np.isfinite(x)
    else tables.EMPTY
    for x in map(float, estimate)
  ]
  is_unknown = np.isnan(estimate.value)
  return tables.EMPTY if is_unknown else "{} [{}, {}]".format(*texts)
