"""Comparisons of arms against SciPy and hand computations."""

import math

import numpy as np
import pytest
from scipy import stats

from mtv_jax.report import contrasts
from mtv_jax.report.contrasts import ArmMeasurements, Metric
from mtv_jax.studies import statistics
from mtv_jax.utils.errors import InputError

TOP1 = Metric("top1", chance=0.05)
RMSE = Metric("rmse", unit="m", lower=True, chance=3.0)


def measure(metric, arms, **known):
  """Measurements of one metric, from lists (by seed) or dicts by arm."""

  def by_seed(values):
    seeds = values.items() if isinstance(values, dict) else enumerate(values)
    return {seed: {metric.name: value} for seed, value in seeds}

  fields = {"values": arms, **known}
  return ArmMeasurements(
    **{
      field: {arm: by_seed(values) for arm, values in content.items()}
      for field, content in fields.items()
    }
  )


def compare_one(metric, arms, **known):
  data = measure(metric, arms, **known)
  [row] = statistics.compare(data, [metric], baseline="vl")
  return row


def test_paired_t_interval_is_scipys():
  vl, depth = [0.31, 0.33, 0.29, 0.35, 0.30], [0.36, 0.37, 0.35, 0.38, 0.37]
  row = compare_one(TOP1, {"vl": vl, "depth": depth})
  expected = stats.ttest_rel(depth, vl)
  interval = expected.confidence_interval(0.95)
  assert row.test == "paired t" and row.n == 5 and row.items == ""
  assert row.difference == pytest.approx(0.05)
  assert row.p == pytest.approx(expected.pvalue, rel=1e-9)
  assert (row.low, row.high) == pytest.approx((interval.low, interval.high))
  assert row.verdict == "better" and row.note == ""


def test_lower_is_better():
  vl, depth = [1.9, 2.0, 2.1, 1.95], [1.5, 1.62, 1.7, 1.53]
  row = compare_one(RMSE, {"vl": vl, "depth": depth})
  assert row.difference < 0 < row.gain
  assert row.verdict == "better"
  assert compare_one(RMSE, {"vl": depth, "depth": vl}).verdict == "worse"
  higher = Metric("rmse")
  assert compare_one(higher, {"vl": vl, "depth": depth}).verdict == "worse"


def test_only_common_seeds_are_paired():
  vl = {0: 0.30, 1: 0.32, 2: 0.31, 3: 0.9, 4: 0.9}
  ssl = {0: 0.33, 1: 0.36, 2: 0.33, 7: 0.0}
  row = compare_one(TOP1, {"vl": vl, "ssl": ssl})
  expected = stats.ttest_rel([0.33, 0.36, 0.33], [0.30, 0.32, 0.31])
  assert row.n == 3 and row.p == pytest.approx(expected.pvalue)
  assert row.note == "not used, as other arms lack the seed: 3 runs"


def test_other_seeds_are_compared_by_welch():
  vl, ssl = {0: 0.30, 1: 0.32, 2: 0.37}, {5: 0.43, 6: 0.46}
  row = compare_one(TOP1, {"vl": vl, "ssl": ssl})
  expected = stats.ttest_ind([*ssl.values()], [*vl.values()], equal_var=False)
  interval = expected.confidence_interval(0.95)
  assert row.test == "Welch t" and row.n == 0 and "not paired" in row.note
  assert row.p == pytest.approx(expected.pvalue)
  assert (row.low, row.high) == pytest.approx((interval.low, interval.high))


def test_one_seed_has_an_interval_over_items_alone():
  arms = {"vl": [0.30], "depth": [0.36]}
  errors = {"vl": [0.012], "depth": [0.016]}
  row = compare_one(TOP1, arms, errors=errors)
  assert row.low is None and row.n == 1 and row.test == "items"
  assert row.items == "errors" and "one seed" in row.note
  half = 1.959964 * 0.02
  interval = (row.item_low, row.item_high)
  assert interval == pytest.approx((0.06 - half, 0.06 + half))
  assert row.p == pytest.approx(2 * (1 - stats.norm.cdf(3)))
  assert row.verdict == "better"


def test_one_seed_without_errors_decides_nothing():
  row = compare_one(TOP1, {"vl": [0.30], "depth": [0.90]})
  assert row.difference == pytest.approx(0.6)
  assert (row.p, row.low, row.item_low) == (None, None, None)
  assert row.verdict == "not distinguishable"


def test_equal_differences_are_no_certainty():
  # Seeds that do nothing would otherwise give p = 0.
  arms = {"vl": [0.30, 0.31, 0.32], "depth": [0.40, 0.41, 0.42]}
  row = compare_one(TOP1, arms)
  assert row.p is None and row.low is None
  assert row.verdict == "not distinguishable"
  assert "all seeds differ equally" in row.note
  errors = {arm: [0.01] * 3 for arm in arms}
  row = compare_one(TOP1, arms, errors=errors)
  assert row.test == "items" and row.verdict == "better"
  same = compare_one(TOP1, {"vl": [0.3, 0.3], "depth": [0.3, 0.3]})
  assert same.difference == 0 and same.verdict == "not distinguishable"


def test_missing_values_and_nan():
  arms = {"vl": [0.30, math.nan, 0.31, 0.29], "depth": [0.4, 0.5, 0.42, None]}
  row = compare_one(TOP1, arms)
  expected = stats.ttest_rel([0.4, 0.42], [0.30, 0.31])
  assert row.n == 2 and row.p == pytest.approx(expected.pvalue)
  row = compare_one(TOP1, {"vl": [0.3, 0.31], "depth": [math.nan, None]})
  assert row.difference is None and row.p_holm is None
  assert row.verdict == "missing" and row.note == "no value of depth"
  data = ArmMeasurements({"vl": {0: {"top1": 0.3}}, "ssl": {0: {}}})
  [row] = statistics.compare(data, [TOP1], baseline="vl")
  assert row.verdict == "missing"
  with pytest.raises(InputError, match="'VL' is none of the arms: vl, ssl"):
    statistics.compare(data, [TOP1], baseline="VL")


def test_interval_over_items_must_agree():
  arms = {"vl": [0.300, 0.310, 0.320], "depth": [0.3201, 0.3302, 0.3400]}
  row = compare_one(TOP1, arms)
  assert row.p < 1e-3 and row.verdict == "better"
  errors = {arm: [0.02] * 3 for arm in arms}
  row = compare_one(TOP1, arms, errors=errors)
  # All seeds share the items, so their error does not shrink.
  assert row.item_high - row.difference > 1.95 * math.hypot(0.02, 0.02)
  assert row.verdict == "not distinguishable"


def test_paired_resamples_cancel_common_items():
  rng = np.random.default_rng(0)
  base = rng.random(500)
  items = {"vl": base, "depth": base + 0.02 + 0.05 * rng.standard_normal(500)}
  drawn = rng.integers(500, size=(400, 500))
  resamples = {arm: [x[drawn].mean(axis=1)] for arm, x in items.items()}
  values = {arm: [x.mean()] for arm, x in items.items()}
  row = compare_one(TOP1, values, resamples=resamples)
  gaps = items["depth"] - items["vl"]
  half = 1.96 * gaps.std(ddof=1) / math.sqrt(500)
  assert row.items == "resamples"
  assert row.item_high - row.item_low == pytest.approx(2 * half, rel=0.15)
  assert row.verdict == "better"
  errors = {arm: [x.std() / math.sqrt(500)] for arm, x in items.items()}
  assert compare_one(TOP1, values, errors=errors).verdict != "better"
  # Other data: items can't be paired.
  other = {**resamples, "vl": [resamples["vl"][0][:100]]}
  row = compare_one(TOP1, values, errors=errors, resamples=other)
  assert row.items == "errors"


def test_holm_by_hand():
  p_values = [0.01, None, 0.04, 0.03, 0.005, 0.9]
  # Sorted 0.005, 0.01, 0.03, 0.04, 0.9 times 5, 4, 3, 2, 1, never decreasing.
  expected = [0.04, None, 0.09, 0.09, 0.025, 0.9]
  adjusted = contrasts.holm(p_values)
  assert [p and round(p, 12) for p in adjusted] == expected
  assert contrasts.holm([0.7, 0.6]) == [1.0, 1.0]
  assert contrasts.holm([]) == []


def test_a_table_is_one_family():
  rng = np.random.default_rng(1)
  values = {
    arm: {
      seed: {m: level + 0.01 * rng.standard_normal() for m in ("top1", "rmse")}
      for seed in range(4)
    }
    for arm, level in dict(vl=0.3, ssl=0.33, depth=0.36).items()
  }
  data = ArmMeasurements(values)
  rows = statistics.compare(data, [TOP1, RMSE], baseline="vl")
  names = [(row.metric.name, row.arm) for row in rows]
  assert names == [(m, a) for m in ("top1", "rmse") for a in ("ssl", "depth")]
  smallest = min(rows, key=lambda row: row.p)
  assert smallest.p_holm == pytest.approx(4 * smallest.p)


def test_summary():
  arms = {"vl": [0.3, 0.34, 0.35], "one": [0.3], "bare": [0.3]}
  data = measure(TOP1, arms, errors={"vl": [0.01] * 3, "one": [0.01]})
  summary = statistics.summarise_arm(data, TOP1, "vl")
  interval = stats.ttest_1samp([0.3, 0.34, 0.35], 0).confidence_interval(0.95)
  ends = 100 * interval.low, 100 * interval.high
  assert (summary.low, summary.high) == pytest.approx(ends)
  assert summary.points == pytest.approx([30, 34, 35])
  assert summary.chance == pytest.approx(5)
  one = statistics.summarise_arm(data, TOP1, "one")
  assert (one.low, one.high) == pytest.approx((30 - 1.96, 30 + 1.96))
  assert statistics.summarise_arm(data, TOP1, "bare").low is None
  assert statistics.summarise_arm(data, RMSE, "vl").value is None


def test_synergy_by_hand():
  arms = {"ssl": [1.8, 1.95, 2.0], "depth": [1.5, 1.6, 1.55]}
  arms |= {"vl": [1.9, 2.0, 2.1], "ssl+depth": [1.2, 1.25, 1.32]}
  data = measure(RMSE, arms)
  [row] = statistics.find_synergies(data, [RMSE])
  assert (row.first, row.second, row.better) == ("ssl", "depth", "depth")
  x = {arm: np.array(values) for arm, values in arms.items()}
  expected = stats.ttest_rel(x["ssl+depth"], x["depth"])
  assert row.over_better.p == pytest.approx(expected.pvalue)
  assert row.over_better.gain == pytest.approx(0.29333333)
  # Over the sum of both gains over chance.
  additive = x["ssl"] + x["depth"] - 3.0
  expected = stats.ttest_rel(x["ssl+depth"], additive)
  interval = expected.confidence_interval(0.95)
  assert row.over_additive.p == pytest.approx(expected.pvalue)
  assert row.over_additive.low == pytest.approx(interval.low)
  expected = (x["ssl+depth"] - additive).mean()
  assert row.over_additive.difference == pytest.approx(expected)
  no_chance = Metric("rmse", lower=True)
  assert statistics.find_synergies(data, [no_chance])[0].over_additive is None


def test_synergy_of_a_missing_single():
  arms = {"a": [math.nan] * 2, "b": [0.3, 0.4], "a+b": [0.5, 0.6]}
  data = measure(TOP1, arms)
  [row] = statistics.find_synergies(data, [TOP1])
  assert row.better == "b" and row.over_additive.verdict == "missing"
  assert statistics.find_synergies(measure(TOP1, {"a+b": [0.5]}), [TOP1]) == []


def test_intervals_of_errors_cover_the_true_difference():
  """1,000 studies of 5 seeds and 200 items with a known true difference."""
  rng = np.random.default_rng(7)
  trials, seeds, truth, inside = 1000, 5, 0.03, 0
  error = 0.3 / math.sqrt(200)
  for _ in range(trials):
    # Seed effects are shared by arms, item effects by arms and seeds.
    shared = 0.05 * rng.standard_normal(seeds)
    own = 0.02 * rng.standard_normal((2, seeds))
    sampled = error * rng.standard_normal(2)
    vl = 0.4 + shared + own[0] + sampled[0]
    depth = 0.4 + truth + shared + own[1] + sampled[1]
    errors = {"vl": [error] * seeds, "depth": [error] * seeds}
    row = compare_one(TOP1, {"vl": vl, "depth": depth}, errors=errors)
    inside += row.item_low <= truth <= row.item_high
  assert 0.93 <= inside / trials <= 0.97


def test_resampled_intervals_cover_the_true_difference():
  """Seeds and items are both drawn: crossed effects, 300 studies."""
  rng = np.random.default_rng(3)
  trials, seeds, items, truth = 300, 5, 100, 0.03
  inside = 0
  for _ in range(trials):
    effect = 0.3 * rng.standard_normal(items)
    noise = 0.1 * rng.standard_normal((seeds, items))
    gaps = truth + effect + noise + 0.01 * rng.standard_normal((seeds, 1))
    base = rng.random((seeds, items))
    drawn = rng.integers(items, size=(400, items))
    arms, resamples = {}, {}
    for arm, x in (("vl", base), ("depth", base + gaps)):
      arms[arm] = [*x.mean(axis=1)]
      resamples[arm] = [run[drawn].mean(axis=1) for run in x]
    row = compare_one(TOP1, arms, resamples=resamples)
    assert row.items == "resamples"
    inside += row.item_low <= truth <= row.item_high
  assert 0.93 <= inside / trials <= 0.97
