"""Schedules against golden values."""

import functools

import pytest
from optim_samples import build

from mtv_jax.config import sections
from mtv_jax.config.durations import RunLength
from mtv_jax.train.optim import schedules
from mtv_jax.utils.errors import ConfigError


def make_schedule(config, lr):
  config = sections.read(schedules.ScheduleConfig, config, "config.schedule")
  length = RunLength(8, None, 100)
  return schedules.make_schedule(config, lr=lr, length=length)


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    (
      {"name": "constant"},
      {0: 1.0, 50: 1.0, 99: 1.0},
    ),
    (
      {"name": "constant", "warmup_steps": 10, "cooldown_steps": 20},
      {0: 0.1, 4: 0.5, 9: 1.0, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0, 120: 0.0},
    ),
    (
      {"name": "cosine", "warmup_percent": 20},
      # (1 + cos(pi/4)) / 2 = 0.853553
      {0: 0.05, 19: 1.0, 20: 1.0, 40: 0.853553, 60: 0.5, 100: 0.0, 150: 0.0},
    ),
    (
      {"name": "cosine", "end": 0.1},
      {0: 1.0, 50: 0.55, 100: 0.1},
    ),
    (
      {"name": "rsqrt", "warmup_examples": 80, "timescale_steps": 30},
      {0: 0.1, 9: 1.0, 10: 1.0, 40: 0.707107, 100: 0.5},
    ),
  ],
)
def test_schedules(config, expected):
  schedule = make_schedule(config, lr=2.0)
  got = {t: float(schedule(t)) / 2 for t in expected}
  assert got == pytest.approx(expected, abs=1e-6)


def test_schedule_errors():
  make = functools.partial(make_schedule, lr=1.0)
  with pytest.raises(ConfigError, match="60 steps of warm-up and 50 of cool"):
    make({"warmup_steps": 60, "cooldown_steps": 50})
  with pytest.raises(ConfigError, match="'cosin'. Did you mean 'cosine'"):
    make({"name": "cosin"})
  with pytest.raises(ConfigError, match="schedule.end is 2, expected a number"):
    make({"end": 2})
  with pytest.raises(ConfigError, match="no option 'warmup'. .*warmup_steps"):
    make({"warmup": 3})
  for config, message in [
    ({"name": "rsqrt"}, "end_lr=1e-06 is an option of the cosine alone"),
    ({"end": 0.1}, "end_lr=1e-06 and end=0.1 are two ends; give one of them"),
    ({"cooldown_steps": 5}, "end_lr=1e-06 contradicts a cool-down"),
    ({"end_lr": 2.0}, "end_lr=2 exceeds the peak rate, 1 at this batch size"),
  ]:
    with pytest.raises(ConfigError, match=message):
      make({"end_lr": 1e-6, **config})


@pytest.mark.parametrize(
  ("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0), (None, 4.0)]
)
def test_the_rate_follows_the_batch_and_its_end_does_not(scaling, factor):
  config = {"lr": 2e-3, "lr_per_examples": 256, "lr_scaling": scaling}
  for batch_size, ratio in [(1024, factor), (256, 1.0), (64, 1 / factor)]:
    schedule = build(
      config,
      {"name": "cosine", "end_lr": 1e-6},
      total_steps=100,
      batch_size=batch_size,
    ).schedule
    assert float(schedule(0)) == pytest.approx(2e-3 * ratio, rel=1e-6)
    middle = (2e-3 * ratio + 1e-6) / 2
    assert float(schedule(50)) == pytest.approx(middle, rel=1e-6)
    assert float(schedule(100)) == pytest.approx(1e-6, rel=1e-5)
  with pytest.raises(ConfigError, match="'sqrt' has no effect without"):
    build({"lr_scaling": "sqrt"})
