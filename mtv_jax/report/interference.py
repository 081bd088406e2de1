"""Interference of objectives: estimates from gradients, and their charts.

A gradient on k batches is signal plus noise: g = mu + e. Inner products of
disjoint sets of batches estimate those of mu without the noise. From them,

  reliability  |mu|^2 / E|g|^2, the expected cosine of one objective's gradient
               on two disjoint sets (split-half reliability)
  cosine       <mu_i, mu_j> / (|mu_i| |mu_j|), the cosine of two gradients
               corrected for attenuation by sqrt(rel_i rel_j) (Spearman 1904)
  noise        the cosine of e_i and e_j on the same batches

A mean over m times as many batches has reliability m r / (1 + (m - 1) r)
(Spearman 1910, Brown 1910). Intervals are 95 %, by the jackknife over sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from mtv_jax.report import charts, page, tables
from mtv_jax.report.charts import Chart, Series
from mtv_jax.report.run_folders import RunRecord, group_by_arm
from mtv_jax.utils.text import file_name

ENCODER = "encoder"  # All blocks together.
_LEVEL = 0.95

_LOOP_NOTE = (
  "Means over the measurements of a run, each of one batch, leaving out blocks "
  "without a gradient. Where the cosine is negative, a step along one gradient "
  "on this batch raises the other loss on it, to first order. The noise of a "
  "batch is included. In the fall of losses, rows are the objectives whose "
  "gradient is followed."
)
_RELIABILITY_NOTE = (
  "Reliability r is the expected cosine of an objective's encoder gradient on "
  "two disjoint sets of batches. Two objectives in full agreement have a "
  "cosine of sqrt(r1 r2) on different sets. The last column is the number of "
  "batches whose mean reaches the required reliability. Brackets are 95 % "
  "intervals, by the jackknife over sets."
)
_COSINES_NOTE = (
  "Cosines of expected gradients: from inner products of different batches, so "
  "without the noise that the objectives share on one batch. Its cosine is in "
  "the columns “noise”. “can't be told”: the mean gradient over half of the "
  "batches is less reliable than required, for either objective."
)
_TRANSFER_NOTE = (
  "Changes of losses on other batches after steps of equal length along mean "
  "gradients, in percent. The loss falls by slope minus curvature: a negative "
  "slope is a conflict, a positive curvature alone is not. Controls: each "
  "gradient's entries shuffled within blocks, and a random direction. Brackets "
  "are 95 % intervals over batches."
)


class Estimate(NamedTuple):
  """Values with their 95 % intervals; NaN where undefined."""

  value: np.ndarray
  low: np.ndarray
  high: np.ndarray

  @classmethod
  def around(cls, value: Any, error: Any, degrees: int) -> Estimate:
    """The interval of Student's t with standard errors."""
    half = special.stdtrit(degrees, (1 + _LEVEL) / 2) * error
    return cls(np.asarray(value), value - half, value + half)

  @classmethod
  def of_mean(cls, samples: np.ndarray) -> Estimate:
    """The mean over the first axis, of independent samples."""
    n = len(samples)
    error = samples.std(axis=0, ddof=1) / np.sqrt(n)
    return cls.around(samples.mean(axis=0), error, n - 1)

  def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Applies a monotone function; a falling one exchanges the ends."""
    value, *ends = map(function, self)
    return Estimate(value, np.minimum(*ends), np.maximum(*ends))

  def to_dict(self) -> dict[str, Any]:
    """Nested lists; None for values that are not finite."""
    return {k: to_lists(v) for k, v in self._asdict().items()}

  @classmethod
  def from_dict(cls, content: Mapping[str, Any]) -> Estimate:
    return cls(*(np.array(content[name], float) for name in cls._fields))


def to_lists(values: np.ndarray) -> Any:
  """Nested lists; None for values that are not finite."""
  return np.where(np.isfinite(values), values.astype(object), None).tolist()


class Moments(NamedTuple):
  """Mean inner products of O gradients on B blocks and the encoder.

  `across` different sets of batches and `within` one set, `[O, O, B + 1]`;
  without one set, `[S, O, O, B + 1]`, in `replicates`.
  """

  across: np.ndarray
  within: np.ndarray
  replicates: Moments | None = None

  @classmethod
  def of_sets(cls, products: Float[np.ndarray, "s o s o b"]) -> Moments:
    """From the inner products of mean gradients on S disjoint sets."""
    sets = range(len(products))
    without = [np.delete(np.delete(products, s, 0), s, 2) for s in sets]
    parts = [_average_products(p) for p in without]
    replicates = cls(*map(np.stack, zip(*parts, strict=True)))
    return cls(*_average_products(products), replicates)

  @classmethod
  def of_halves(cls, halves: Sequence[Mapping[str, Any]]) -> Moments:
    """From `measure_halves` of T batches, or rows of `interference.jsonl`."""
    parts = []
    for key in ("across", "within"):
      parts.append(
        _add_encoder(np.array([h[f"half_{key}"] for h in halves], float))
      )
    others = [(x.sum(0) - x) / (len(x) - 1) for x in parts]
    return cls(*(x.mean(0) for x in parts), cls(*others))

  def estimate(self, function: Callable[[Moments], np.ndarray]) -> Estimate:
    """A function of the moments, with the jackknife's interval."""
    parts = function(self.replicates)
    n = len(parts)
    error = np.sqrt((n - 1) * parts.var(axis=0))
    return Estimate.around(function(self), error, n - 1)


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


def reliability(moments: Moments) -> Float[np.ndarray, "*s o b"]:
  """Reliability by objective and block; NaN without a gradient."""
  return _divide(_norms(moments.across), _norms(moments.within))


def corrected_cosines(moments: Moments) -> Float[np.ndarray, "*s o o b"]:
  """Cosines of expected gradients; NaN without a positive signal."""
  return _normalize(moments.across)


def noise_cosines(moments: Moments) -> Float[np.ndarray, "*s o o b"]:
  """Cosines of the noise of two objectives on the same batches."""
  return _normalize(moments.within - moments.across)


def _norms(products: np.ndarray) -> np.ndarray:
  """Squared norms [..., O, B] of products [..., O, O, B]."""
  return np.einsum("...iib->...ib", products)


def _normalize(products: np.ndarray) -> np.ndarray:
  norms = np.sqrt(np.maximum(_norms(products), 0))
  return _divide(products, norms[..., :, None, :] * norms[..., None, :, :])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def extrapolate(factor: int | float) -> Callable[[np.ndarray], np.ndarray]:
  """Maps a reliability to that of means over `factor` as many batches."""

  def reliability_of_means(r):
    r = np.maximum(r, 0)
    return factor * r / (1 + (factor - 1) * r)

  return reliability_of_means


def batches_needed(
  batches: int | float, target: float
) -> Callable[[np.ndarray], np.ndarray]:
  """Maps the reliability of `batches` to the number that reaches a target."""

  def needed(r):
    r = np.clip(r, 0, 1)
    odds = np.divide(1 - r, r, out=np.full_like(r, np.inf), where=r > 0)
    return np.where(np.isnan(r), r, batches * odds * target / (1 - target))

  return needed


def describe_gradients(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  """Conflicts between objectives' gradients, if measured."""
  yield from _describe_loop(runs)
  measured = [(run, m) for run in runs for m in run.checkpoint_interference]
  if measured:
    yield page.Heading("Gradients at checkpoints")
    names = len({run.name for run, _ in measured}) > 1
    labels = [
      f"{run.name}, step {m['step']:,}" if names else f"step {m['step']:,}"
      for run, m in measured
    ]
    measurements = [m for _, m in measured]
    yield from describe_measurements(labels, measurements)


def _describe_loop(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  arms = group_by_arm(runs).items()
  drawn = {arm: [*_draw_arm(runs)] for arm, runs in arms}
  drawn = {arm: blocks for arm, blocks in drawn.items() if blocks}
  if not drawn:
    return
  yield page.Heading("Gradients of objectives")
  yield page.Note(_LOOP_NOTE)
  for arm, blocks in drawn.items():
    yield page.Heading(arm, level=3)
    yield from blocks


def describe_measurements(
  labels: Sequence[str], measurements: Sequence[Mapping[str, Any]]
) -> Iterator[page.PageBlock]:
  """Tables of measurements at checkpoints; transfer is collapsed."""
  yield page.Note(_RELIABILITY_NOTE)
  for label, m in zip(labels, measurements, strict=True):
    yield page.Heading(f"Reliability, {label}", level=3)
    yield page.Table(_reliability_table(m), numbers=1)
  if any(len(m["objectives"]) > 1 for m in measurements):
    yield page.Heading("Cosines of expected gradients", level=3)
    yield page.Note(_COSINES_NOTE)
    yield page.Table(_cosine_table(labels, measurements), numbers=1)
  if any(m.get("transfer") for m in measurements):
    yield page.Heading("Change of losses along gradients", level=3)
    yield page.Note(_TRANSFER_NOTE)
  for label, m in zip(labels, measurements, strict=True):
    if m.get("transfer"):
      for part in ("slope", "curvature"):
        table = _transfer_table(m, part)
        title = f"{part.capitalize()} (%), {label}"
        yield page.Details(title, [page.Table(table, numbers=1)])


def format_estimate(e: Estimate, index: Any, *, digits: int = 2) -> str:
  """Value and interval of one entry; a dash where undefined."""
  value, low, high = (float(x[index]) for x in e)
  if np.isnan(value):
    return tables.EMPTY
  texts = (
    "–" if not np.isfinite(x) else f"{x:.{digits}f}".replace("-", "−")
    for x in (value, low, high)
  )
  return "{} [{}, {}]".format(*texts)


def _reliability_table(m: Mapping[str, Any]) -> list[list[str]]:
  columns = [
    (_name_batches(row["batches"]), Estimate.from_dict(row), 2)
    for row in m["reliability"]
  ]
  mean = Estimate.from_dict(m["mean_reliability"])
  columns.append((f"{m['batches'] // 2} (extrapolated)", mean, 2))
  needed = Estimate.from_dict(m["batches_needed"])
  columns.append(("batches needed", needed, 0))
  rows = [["objective", *(head for head, _, _ in columns)]]
  for i, name in enumerate(m["objectives"]):
    cells = (
      format_estimate(e, (i, -1), digits=digits) for _, e, digits in columns
    )
    rows.append([name, *cells])
  return rows


def _name_batches(count: int | float) -> str:
  if count < 1:
    return "half a batch"
  return "1 batch" if count == 1 else f"{count:.0f} batches"


def _cosine_table(
  labels: Sequence[str], measurements: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
  """Corrected cosines of the whole encoder: a row for each pair."""
  rows: dict[tuple[str, str], dict[str, str]] = {}
  for label, m in zip(labels, measurements, strict=True):
    cosines = Estimate.from_dict(m["cosines"])
    noise = Estimate.from_dict(m["noise_cosines"])
    for i, j in itertools.combinations(range(len(m["objectives"])), 2):
      pair = m["objectives"][i], m["objectives"][j]
      cells = rows.setdefault(pair, {})
      cells[label] = "can't be told"
      if m["told"][i][-1] and m["told"][j][-1]:
        cells[label] = format_estimate(cosines, (i, j, -1))
      cells[f"noise, {label}"] = format_estimate(noise, (i, j, -1))
  columns = [*labels, *(f"noise, {label}" for label in labels)]
  table = [["pair", *columns]]
  for pair, cells in rows.items():
    line = [cells.get(column, tables.EMPTY) for column in columns]
    table.append([", ".join(pair), *line])
  return table


def _transfer_table(m: Mapping[str, Any], part: str) -> list[list[str]]:
  """Percent by direction and loss."""
  e = Estimate.from_dict(m["transfer"][part])
  e = Estimate(*(100 * x for x in e))
  rows = [["along", *m["objectives"]]]
  for i, name in enumerate(m["transfer"]["directions"]):
    cells = (format_estimate(e, (i, j)) for j in range(len(m["objectives"])))
    rows.append([name, *cells])
  return rows


def _draw_arm(runs: Sequence[RunRecord]) -> Iterator[page.PageBlock]:
  """Charts of an arm's measurements in training, averaged over seeds too.

  Skips measurements whose objectives differ from the last measurement, as some
  objectives start later.
  """
  rows = [row for run in runs for row in run.interference]
  if not rows or len(rows[-1]["objectives"]) < 2:
    return
  keys = ("objectives", "blocks")
  rows = [r for r in rows if all(r[key] == rows[-1][key] for key in keys)]
  drawn = _draw_interference(rows, runs[0].arm) + _draw_conflicts(runs)
  yield page.Charts(drawn)
  halves = [row for row in rows if row.get("half_across") is not None]
  if len(halves) > 1:
    half = Moments.of_halves(halves).estimate(reliability)
    whole = half.map(extrapolate(2))
    table = [["reliability of a gradient", "half a batch", "1 (extrapolated)"]]
    for i, name in enumerate(rows[-1]["objectives"]):
      cells = (format_estimate(e, (i, -1)) for e in (half, whole))
      table.append([name, *cells])
    yield page.Table(table, numbers=1)


def _draw_interference(
  rows: Sequence[Mapping[str, Any]], arm: str
) -> list[Chart]:
  """Heat maps of measurements with equal objectives and blocks."""
  objectives, blocks = rows[-1]["objectives"], rows[-1]["blocks"]
  pairs = [", ".join(pair) for pair in itertools.combinations(objectives, 2)]
  losses = dict(columns=objectives, x_label="loss")
  drawn = []
  for key, title, names, options in (
    ("cosines", "Cosine of two gradients", pairs, dict(limit=1)),
    ("norms", "Norm of the gradient", objectives, {}),
    ("transfer", "Fall of losses (%) along a gradient", objectives, losses),
  ):
    measured = [row for row in rows if row.get(key) is not None]
    if not measured:
      continue
    if key == "cosines":
      mean = mean_cosines(measured)[np.triu_indices(len(objectives), 1)]
    else:
      mean = np.array([row[key] for row in measured], float).mean(0)
    options = dict(columns=blocks, x_label="block") | options
    values = to_lists(mean * (100 if key == "transfer" else 1))
    name = file_name(key, arm)
    drawn.append(
      charts.heat_map(title, values, rows=names, name=name, **options)
    )
  return drawn


def mean_cosines(
  rows: Sequence[Mapping[str, Any]],
) -> Float[np.ndarray, "o o b"]:
  """Mean cosines over the rows in which both gradients are non-zero.

  NaN if there are none. Rows without `norms` count where the cosine is not 0.
  """
  total, count = 0.0, 0.0
  for row in rows:
    cosines = np.array(row["cosines"], float)
    has_gradient = cosines != 0
    if row.get("norms") is not None:
      norms = np.array(row["norms"], float)
      has_gradient = (norms[:, None] > 0) & (norms[None] > 0)
    total = total + np.where(has_gradient, cosines, 0.0)
    count = count + has_gradient
  return _divide(total, count)


def _draw_conflicts(runs: Sequence[RunRecord]) -> list[Chart]:
  lines = []
  for colour, run in enumerate(runs):
    rows = [r for r in run.interference if r.get("conflicts") is not None]
    points = [(row["step"], 100 * row["conflicts"]) for row in rows]
    name = f"seed {run.seed}" if len(runs) > 1 else run.name
    lines.append(Series(name, points, colour))
  if not any(len(line.points) > 1 for line in lines):
    return []
  name = file_name("conflicts", runs[0].arm)
  title = "Negative cosines (% of pairs and blocks)"
  return [charts.line_chart(title, lines, name=name, x_label="step")]
