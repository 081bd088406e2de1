"""Balance of the objectives' encoder gradient norms in a run."""

import json
import pathlib

import numpy as np

from mtv_jax.perf.bench import harness
from mtv_jax.report.run_folders import read_rows
from mtv_jax.utils.errors import InputError


def run(workdir: str, *, after: int = 0) -> harness.BenchResult:
  """Mean norms, and the ratios of the largest norm to the smallest.

  Args:
    workdir: a run with `log.gradients_steps` and a balance that scales weights.
    after: use only norms logged after this step.
  """
  names, balanced, plain = read_norms(pathlib.Path(workdir), after)
  result = harness.BenchResult(
    run=workdir, after=after, measurements=len(balanced)
  )
  for title, norms in (("balanced", balanced), ("without_factors", plain)):
    means, ratios = mean_norms(norms), norms.max(1) / norms.min(1)
    scatter = np.log(norms).std(0)
    label = title.replace("_", " ")
    ratio = float(means.max() / means.min())
    result.add(f"{title}_ratio", ratio, f"{label}, means' ratio", "{:.1f}")
    values = [*zip(names, means, scatter, strict=True)]
    result.add(title, {name: float(mean) for name, mean, _ in values})
    for name, mean, deviation in values:
      text = f"{mean:.2f}, deviation of the log {deviation:.2f}"
      result.add(f"{title}_{name}_deviation", float(deviation), name, text)
    above = f"{(ratios > 10).sum()} of {len(ratios)} above 10"
    largest = float(ratios.max())
    text = f"{largest:.1f}, {above}"
    result.add(f"{title}_largest", largest, "largest single ratio", text)
  return result


def read_norms(
  workdir: pathlib.Path, after: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Reads names, norms, and norms without the balance's factors.

  Norms are `[steps, names]`, for the steps above `after` that logged them.
  """
  config = json.loads((workdir / "config.json").read_text())["objectives"]
  weights = {name: entry["weight"] for name, entry in config.items()}
  balanced, plain = [], []
  used = dict(weights)  # Weights before the update; initially the config's.
  for row in read_rows(workdir / "metrics.jsonl"):
    if any(f"{name}/weight" not in row for name in weights):
      continue
    norms = {n: row.get(f"{n}/encoder_grad_norm") for n in weights}
    if all(norms.values()) and row["step"] > after:
      balanced.append(list(norms.values()))
      plain.append([v * weights[n] / used[n] for n, v in norms.items()])
    used = {name: row[f"{name}/weight"] for name in weights}
  if not balanced:
    raise InputError(
      f"{workdir} has no gradient norms of all objectives after step {after}:"
      " train it with log.gradients_steps."
    )
  return list(weights), np.array(balanced), np.array(plain)


def mean_norms(norms: np.ndarray) -> np.ndarray:
  """Geometric mean over steps, `[names]`."""
  return np.exp(np.log(norms).mean(0))
