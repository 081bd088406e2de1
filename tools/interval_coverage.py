"""Coverage of 95 % intervals over seeds and items, simulated.

  python tools/interval_coverage.py
  python tools/interval_coverage.py --study=studies/null --seeds=5

Simulates studies of two arms whose seeds are normal or bimodal, with items that
all seeds of an arm share, and prints how often an interval has the true
difference of the means: for `report/contrasts.py` and for alternatives. Where
both arms are alike, the rest are false positives. With `--study`, draws
disjoint sets of an arm's finished runs instead, whose true difference is 0.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

from mtv_jax.report import contrasts
from mtv_jax.report.contrasts import ArmMeasurements
from mtv_jax.studies import statistics

# Zero-shot accuracies of five seeds of the arm `vl`, around their mean.
_MEASURED = np.array([0.465, 0.587, 0.698, 0.718, 0.819]) - 0.6574
_ITEM_ERROR = 0.008  # Standard error of an arm over 1,000 items is up to 0.016.

# Draws [..., n] seeds with mean 0.
SampleFn = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _normal(std: float) -> SampleFn:
  return lambda rng, shape: std * rng.standard_normal(shape)


def _bimodal(share: float, std: float) -> SampleFn:
  """Modes 0.25 apart; the lower one has the share."""

  def sample(rng, shape):
    low = rng.random(shape) < share
    return 0.25 * (share - low) + std * rng.standard_normal(shape)

  return sample


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Log-normal."""
  return 0.05 * (np.exp(0.8 * rng.standard_normal(shape)) - np.exp(0.32))


def _measured(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return rng.choice(_MEASURED, shape) + 0.02 * rng.standard_normal(shape)


# (baseline, arm) by name.
CASES: dict[str, tuple[SampleFn, SampleFn]] = {
  "normal, equal spreads": (_normal(0.03), _normal(0.03)),
  "normal, spreads 0.12 and 0.03": (_normal(0.12), _normal(0.03)),
  "normal, items dominate": (_normal(0.003), _normal(0.003)),
  "measured VL and normal": (_measured, _normal(0.03)),
  "measured VL, both": (_measured, _measured),
  "bimodal 50 %, wide modes": (_bimodal(0.5, 0.05), _normal(0.03)),
  "bimodal 30 %, wide modes": (_bimodal(0.3, 0.05), _normal(0.03)),
  "bimodal 70 %, wide modes": (_bimodal(0.7, 0.05), _normal(0.03)),
  "bimodal 20 %, wide modes": (_bimodal(0.2, 0.05), _normal(0.03)),
  "bimodal 50 %, both": (_bimodal(0.5, 0.02), _bimodal(0.5, 0.02)),
  "bimodal 20 %, both": (_bimodal(0.2, 0.02), _bimodal(0.2, 0.02)),
  "bimodal 50 %, narrow modes": (_bimodal(0.5, 0.01), _normal(0.01)),
  "bimodal 30 %, modes of 3 points": (_bimodal(0.3, 0.03), _normal(0.03)),
  "bimodal 30 %, narrow modes": (_bimodal(0.3, 0.01), _normal(0.01)),
  "bimodal 20 %, narrow modes": (_bimodal(0.2, 0.01), _normal(0.01)),
  "log-normal and normal": (_skewed, _normal(0.03)),
}


def _t(degrees: float | np.ndarray) -> np.ndarray:
  return stats.t.ppf(0.975, degrees)


def half_widths(
  base: np.ndarray, arm: np.ndarray, rng: np.random.Generator
) -> Mapping[str, np.ndarray]:
  """Half widths [trials] by method, for seeds [trials, n] of both arms.

  `chosen` is the package's; the hierarchical bootstrap is centred here.
  """
  n, items = base.shape[1], np.sqrt(2) * _ITEM_ERROR
  paired = np.std(arm - base, axis=1, ddof=1) / np.sqrt(n)
  parts = [np.var(x, axis=1, ddof=1) / n for x in (base, arm)]
  welch = np.sqrt(sum(parts))
  degrees = welch**4 / sum(part**2 / (n - 1) for part in parts)
  drawn = rng.integers(n, size=(300, n))
  counts = np.stack([np.bincount(row, minlength=n) for row in drawn]) / n
  boot = (arm - base) @ counts.T
  boot = boot + items * rng.standard_normal(boot.shape)
  low, high = np.percentile(boot, [2.5, 97.5], axis=1)
  chosen, chosen_degrees = contrasts.combine_errors(welch, items, n)
  return {
    "paired t": _t(n - 1) * paired,
    "paired t, items": _t(n - 1) * np.hypot(paired, items),
    "bootstrap": (high - low) / 2,
    "Welch, items": np.hypot(_t(degrees) * welch, 1.96 * items),
    "factor 1": np.hypot(_t(n - 1) * welch, 1.96 * items),
    "chosen": _t(chosen_degrees) * chosen,
  }


def simulate(
  case: str, n: int, trials: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
  """Coverage and median half width by method."""
  base, arm = (sample(rng, (trials, n)) for sample in CASES[case])
  halves = half_widths(base, arm, rng)
  base, arm = (
    x + _ITEM_ERROR * rng.standard_normal((trials, 1)) for x in (base, arm)
  )
  centre = np.mean(arm - base, axis=1)
  return {
    name: (float(np.mean(np.abs(centre) < half)), float(np.median(half)))
    for name, half in halves.items()
  }


def draw_null(
  folder: str, n: int, trials: int, rng: np.random.Generator
) -> list[list[str]]:
  """False positives of n against n seeds of one arm: a header, then arms."""
  results = statistics.read_study(pathlib.Path(folder))
  data, main = results.measurements, results.main
  rows = [["arm", "seeds", "axes", "intervals without 0", "with a verdict"]]
  for arm, runs in data.values.items():
    seeds, outside, verdicts = [*runs], 0, 0
    if len(seeds) < 2 * n:
      continue
    for _ in range(trials):
      order = rng.permutation(seeds).tolist()
      parts = {"first": order[:n], "second": order[n : 2 * n]}
      fields = {
        field: {
          name: {s: getattr(data, field)[arm][s] for s in part}
          for name, part in parts.items()
        }
        for field in ("values", "errors", "resamples", "protocols")
      }
      drawn = ArmMeasurements(**fields)
      family = contrasts.correct_contrasts(
        contrasts.compare_arms(drawn, metric, "second", "first")
        for metric in main
      )
      outside += sum(c.low is not None and c.low * c.high > 0 for c in family)
      verdicts += any(
        c.verdict in (contrasts.BETTER, contrasts.WORSE) for c in family
      )
    share = outside / (trials * len(main))
    numbers = f"{100 * share:.1f} %", f"{100 * verdicts / trials:.1f} %"
    rows.append([arm, str(len(seeds)), str(len(main)), *numbers])
  return rows


def main() -> None:
  """Prints a Markdown table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--trials", type=int, default=20_000)
  parser.add_argument("--seeds", type=int, nargs="+", default=[5, 8, 10])
  parser.add_argument("--study", help="folder of a study with many seeds")
  args = parser.parse_args()
  rng, rows = np.random.default_rng(0), []
  for n in args.seeds:
    if args.study:
      rows += draw_null(args.study, n, args.trials, rng)[bool(rows) :]
      continue
    for case in CASES:
      found = simulate(case, n, args.trials, rng)
      rows = rows or [["seeds", "case", *found, "half width"]]
      texts = [f"{100 * cover:.1f}" for cover, _ in found.values()]
      rows.append([str(n), case, *texts, f"{found['chosen'][1]:.3f}"])
  rows.insert(1, ["---"] * len(rows[0]))
  for row in rows:
    print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
  main()
