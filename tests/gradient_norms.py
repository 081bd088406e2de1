"""Gradient norms of a run: `python tests/gradient_norms.py RUN AFTER_STEP`."""

import json
import pathlib
import sys

import numpy as np
import trainings


def read_norms(
  workdir: pathlib.Path, after: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Names, norms `[steps, names]`, and norms without the balance's factors.

  Of the steps above `after` at which they were logged.
  """
  config = json.loads((workdir / "config.json").read_text())["objectives"]
  weights = {name: entry["weight"] for name, entry in config.items()}
  balanced, plain = [], []
  used = dict(weights)  # In the update before: config weights at the start.
  for row in trainings.rows(workdir):
    if "contrastive/weight" not in row:
      continue
    norms = {n: row.get(f"{n}/encoder_grad_norm") for n in weights}
    if all(norms.values()) and row["step"] > after:
      balanced.append(list(norms.values()))
      plain.append([v * weights[n] / used[n] for n, v in norms.items()])
    used = {name: row[f"{name}/weight"] for name in weights}
  return list(weights), np.array(balanced), np.array(plain)


def mean_norms(norms: np.ndarray) -> np.ndarray:
  """Geometric means over the steps."""
  return np.exp(np.log(norms).mean(0))


def main(workdir: str, after: str) -> None:
  """Prints means, their ratio, and the ratios of single measurements."""
  names, *arrays = read_norms(pathlib.Path(workdir), int(after))
  for title, norms in zip(("balanced", "without factors"), arrays, strict=True):
    means, ratios = mean_norms(norms), norms.max(1) / norms.min(1)
    scatter = np.log(norms).std(0)
    print(f"{title}: means' ratio {means.max() / means.min():.1f}")
    for name, mean, deviation in zip(names, means, scatter, strict=True):
      print(f"  {name}: {mean:.2f}, deviation of the log {deviation:.2f}")
    above = f"{(ratios > 10).sum()} of {len(ratios)} above 10"
    print(f"  single measurements: ratio at most {ratios.max():.1f}, {above}")


if __name__ == "__main__":
  main(*sys.argv[1:])
