"""Comparisons of arms against SciPy, hand computations and simulations."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from mtv_jax.report import contrasts
from mtv_jax.report.contrasts import ArmMeasurements, Metric
from mtv_jax.studies import statistics

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


def compare_one(metric, arms, *, fixed=False, **known):
  data = dataclasses.replace(measure(metric, arms, **known), fixed=fixed)
  row = contrasts.compare_arms(data, metric, "depth", "vl")
  return contrasts.correct_contrasts([row])[0]


VL = [0.31, 0.33, 0.29, 0.35, 0.30, 0.34]
DEPTH = [0.36, 0.37, 0.35, 0.38, 0.37]


@pytest.mark.parametrize("item", [None, 0.02])
def test_half_widths_over_seeds_and_items_add_in_quadrature(item):
  # A seed without an error has that of the others.
  errors = {"vl": [item] * 5 + [None], "depth": [item] * 5} if item else {}
  row = compare_one(TOP1, {"vl": VL, "depth": DEPTH}, errors=errors)
  error = math.hypot(stats.sem(VL), stats.sem(DEPTH))
  quantile = stats.t.ppf(0.975, 4)
  # All seeds share the items, so their error does not shrink.
  items = 1.959964 * math.hypot(item, item) if item else 0.0
  half = math.hypot(1.25 * quantile * error, items)
  assert row.covers == ("seeds and items" if item else "seeds")
  assert row.n == 5 and row.note == ""
  difference = np.mean(DEPTH) - np.mean(VL)
  ends = difference - half, difference + half
  assert (row.low, row.high) == pytest.approx(ends)
  expected = 2 * stats.t.sf(difference * quantile / half, 4)
  assert row.p == pytest.approx(expected)
  assert row.verdict == ("not distinguishable" if item else "better")


def test_lower_is_better():
  vl, depth = [1.9, 2.0, 2.1, 1.95, 2.0], [1.5, 1.62, 1.7, 1.53, 1.6]
  row = compare_one(RMSE, {"vl": vl, "depth": depth})
  assert row.difference < 0 < row.gain
  assert row.verdict == "better"
  assert compare_one(RMSE, {"vl": depth, "depth": vl}).verdict == "worse"
  higher = Metric("rmse")
  assert compare_one(higher, {"vl": vl, "depth": depth}).verdict == "worse"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_than_five_seeds_have_no_verdict(count):
  arms = {"vl": [0.300, 0.301, 0.302, 0.303][:count], "depth": [0.9] * 5}
  errors = {"vl": [0.012] * count, "depth": [0.016] * 5}
  row = compare_one(TOP1, arms, errors=errors)
  assert row.n == count and row.verdict == "no verdict" and row.p is None
  if count > 1:
    assert row.low is None and row.note == f"{count} seeds: no interval"
    return
  assert row.covers == "items" and "over items alone" in row.note
  half = 1.959964 * 0.02
  assert (row.low, row.high) == pytest.approx((0.6 - half, 0.6 + half))
  # Given encoders are compared over the items.
  row = compare_one(TOP1, arms, errors=errors, fixed=True)
  assert (row.low, row.high) == pytest.approx((0.6 - half, 0.6 + half))
  assert row.verdict == "better"


def test_arms_that_are_measured_in_different_ways_are_not_compared():
  arms = {"vl": VL, "depth": DEPTH}
  keys = {"vl": ["crop"] * 6, "depth": ["crop"] * 4 + ["prompter"]}
  row = compare_one(TOP1, arms, protocols=keys)
  assert row.difference is None and row.p_holm is None
  assert row.verdict == "measured in different ways"
  keys["depth"][-1] = "crop"
  assert compare_one(TOP1, arms, protocols=keys).verdict == "better"


def test_equal_seeds_are_no_certainty():
  # Seeds that do nothing would otherwise give p = 0.
  row = compare_one(TOP1, {"vl": [0.3] * 5, "depth": [0.4] * 5})
  assert (row.p, row.low, row.verdict) == (None, None, "no verdict")
  assert row.note == "no variation: no interval"
  row = compare_one(TOP1, {"vl": [0.30], "depth": [0.90]}, fixed=True)
  assert row.difference == pytest.approx(0.6)
  assert (row.p, row.low, row.verdict) == (None, None, "no verdict")


def test_missing_values_and_nan():
  arms = {"vl": [math.nan, *VL], "depth": [*DEPTH, None]}
  row = compare_one(TOP1, arms)
  assert row.n == 5
  assert row.difference == pytest.approx(np.mean(DEPTH) - np.mean(VL))
  row = compare_one(TOP1, {"vl": [0.3, 0.31], "depth": [math.nan, None]})
  assert row.difference is None and row.p_holm is None
  assert row.verdict == "missing" and row.note == "no value of depth"


def test_paired_resamples_cancel_common_items():
  rng = np.random.default_rng(0)
  base = rng.random(500)
  items = {"vl": base, "depth": base + 0.02 + 0.05 * rng.standard_normal(500)}
  drawn = rng.integers(500, size=(400, 500))
  resamples = {arm: [x[drawn].mean(axis=1)] for arm, x in items.items()}
  values = {arm: [x.mean()] for arm, x in items.items()}
  row = compare_one(TOP1, values, resamples=resamples, fixed=True)
  gaps = items["depth"] - items["vl"]
  half = 1.96 * gaps.std(ddof=1) / math.sqrt(500)
  assert row.items == "resamples"
  assert row.high - row.low == pytest.approx(2 * half, rel=0.15)
  assert row.verdict == "better"
  errors = {arm: [x.std() / math.sqrt(500)] for arm, x in items.items()}
  row = compare_one(TOP1, values, errors=errors, fixed=True)
  assert row.verdict == "not distinguishable"
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
  assert contrasts.holm([0.01, None, 0.02], pending=2) == [0.04, None, 0.06]
  assert contrasts.holm([]) == []


def test_summary():
  arms = {"vl": VL, "few": [0.3, 0.4], "one": [0.3], "bare": [0.3]}
  data = measure(TOP1, arms, errors={"vl": [0.01] * 6, "one": [0.01]})
  summary = statistics.summarise_arm(data, TOP1, "vl")
  half = 1.25 * stats.t.ppf(0.975, 5) * stats.sem(VL)
  half = 100 * math.hypot(half, 1.959964 * 0.01)
  mean = 100 * np.mean(VL)
  assert (summary.low, summary.high) == pytest.approx(
    (mean - half, mean + half)
  )
  assert summary.points == pytest.approx([100 * x for x in VL])
  assert summary.chance == pytest.approx(5)
  few = statistics.summarise_arm(data, TOP1, "few")
  assert few.low is None and few.points == pytest.approx([30, 40])
  one = statistics.summarise_arm(data, TOP1, "one")
  ends = one.low, one.high
  assert ends == pytest.approx((30 - 1.96, 30 + 1.96), abs=1e-3)
  assert statistics.summarise_arm(data, TOP1, "bare").low is None
  assert statistics.summarise_arm(data, RMSE, "vl").value is None


def test_synergy_by_hand():
  arms = {"ssl": [1.8, 1.95, 2.0], "depth": [1.5, 1.6, 1.55]}
  arms |= {"vl": [1.9, 2.0, 2.1], "ssl+depth": [1.2, 1.25, 1.32]}
  data = measure(RMSE, arms)
  tested = contrasts.compare_arms(data, RMSE, "ssl+depth", "depth")
  tests = {("rmse", "ssl+depth", "depth"): tested}
  [row] = statistics.find_synergies(data, [RMSE], tests)
  assert (row.first, row.second, row.better) == ("ssl", "depth", "depth")
  assert row.over_better is tested
  assert tested.gain == pytest.approx(0.29333333)
  # Over the sum of both gains over chance.
  x = {arm: np.mean(values) for arm, values in arms.items()}
  expected = x["ssl+depth"] - (x["ssl"] + x["depth"] - 3.0)
  assert row.over_additive.difference == pytest.approx(expected)
  no_chance = Metric("rmse", lower=True)
  [row] = statistics.find_synergies(data, [no_chance], {})
  assert row.over_additive is None and row.over_better.p_holm is None


def test_synergy_of_a_missing_single():
  arms = {"a": [math.nan] * 2, "b": [0.3, 0.4], "a+b": [0.5, 0.6]}
  data = measure(TOP1, arms)
  [row] = statistics.find_synergies(data, [TOP1], {})
  assert row.better == "b" and row.over_additive.verdict == "missing"
  lone = measure(TOP1, {"a+b": [0.5]})
  assert statistics.find_synergies(lone, [TOP1], {}) == []


@pytest.mark.parametrize("bimodal", [False, True])
def test_intervals_cover_the_true_difference(bimodal):
  """800 studies of 5 seeds and 100 items, both drawn: crossed effects."""
  rng = np.random.default_rng(3)
  trials, items, truth, inside = 800, 100, 0.03, 0
  drawn = rng.multinomial(items, [1 / items] * items, size=200) / items
  for _ in range(trials):
    low = rng.random(5) < 0.3
    spread = 0.25 * (0.3 - low) if bimodal else 0.0
    base = 0.4 + spread + 0.05 * rng.standard_normal(5)
    levels = {"vl": base, "depth": 0.4 + truth + 0.03 * rng.standard_normal(5)}
    effects = rng.standard_normal((3, items)) * [[0.3], [0.1], [0.1]]
    arms, resamples = {}, {}
    for k, (arm, level) in enumerate(levels.items()):
      noise = 0.1 * rng.standard_normal((5, items))
      x = level[:, None] + effects[0] + effects[k + 1] + noise
      arms[arm] = [*x.mean(axis=1)]
      resamples[arm] = [*(x @ drawn.T)]
    row = compare_one(TOP1, arms, resamples=resamples)
    assert row.items == "resamples"
    inside += row.low <= truth <= row.high
  assert inside / trials >= 0.93


@pytest.mark.parametrize("spreads", [(0.03, 0.03), (0.12, 0.03)])
def test_power_is_the_share_of_detected_effects(spreads):
  rng, trials, detected = np.random.default_rng(0), 1500, 0
  pilot = statistics.Pilot(spreads, 0.01, 0.05)
  effect = pilot.detectable_effect(6)
  assert pilot.count_seeds(effect) == 6
  assert pilot.count_seeds(effect / 100) is None
  assert statistics.Pilot((0.0, 0.0), 0.0, 0.05).count_seeds(3.0) == 5
  for _ in range(trials):
    vl, depth = (s * rng.standard_normal(6) for s in spreads)
    errors = {arm: [0.01 / math.sqrt(2)] * 6 for arm in ("vl", "depth")}
    depth = depth + effect + 0.01 * rng.standard_normal()
    row = compare_one(TOP1, {"vl": vl, "depth": depth}, errors=errors)
    detected += row.p < 0.05
  assert 0.77 <= detected / trials <= 0.86


def test_correlations_of_feature_ranks():
  """Over the runs of all arms, by SciPy of the columns."""
  rng = np.random.default_rng(0)
  rank = Metric(
    "feature_rank/lidar", unit="", type="feature_rank", is_main=False
  )
  other = Metric("grounding/r1")
  metrics = [TOP1, RMSE, other, rank]
  values = rng.normal(size=(3, 2, 4))
  values[..., 1] = -(values[..., 3] ** 3)  # Lower is better.
  names = [m.name for m in metrics]
  arms = {
    arm: {s: dict(zip(names, row, strict=True)) for s, row in enumerate(rows)}
    for arm, rows in zip("abc", values.tolist(), strict=True)
  }
  arms["a"][2] = {TOP1.name: 0.5}  # No rank.
  keys = {arm: {s: dict.fromkeys(names, "k") for s in (0, 1)} for arm in arms}
  keys["c"][1] |= {other.name: "in another way"}
  data = ArmMeasurements(arms, protocols=keys)
  found = statistics.correlate_ranks(data, metrics)
  flat = values.reshape(6, 4)
  expected = stats.spearmanr(flat[:, 0], flat[:, 3]).statistic
  assert found == {
    (TOP1, rank): (pytest.approx(expected), 6),
    (RMSE, rank): (pytest.approx(1), 6),
  }
  del arms["a"], arms["b"][1]
  assert statistics.correlate_ranks(data, metrics) == {}
