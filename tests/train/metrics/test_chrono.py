"""The clock against a fake one."""

import json
import math
import types

import pytest

from mtv_jax.train.metrics import Chrono, Rates


def make_chrono(clock, **kwargs):
  defaults = {"total_steps": 100, "batch_size": 8, "devices": 4}
  defaults["wall_clock"] = lambda: 1e9 + clock.now
  return Chrono(clock=lambda: clock.now, **(defaults | kwargs))


@pytest.fixture
def clock():
  return types.SimpleNamespace(now=100.0)


def take_steps(chrono, clock, count, *, wait=0.25, compute=0.75):
  for _ in range(count):
    with chrono.measure("wait"):
      clock.now += wait
    clock.now += compute
    chrono.step()


def test_chrono_excludes_compilation_and_pauses(clock):
  chrono = make_chrono(clock)
  take_steps(chrono, clock, 1, wait=2, compute=30)
  before = chrono.rates(1)
  assert before.images_per_second == 0 and math.isnan(before.eta)
  take_steps(chrono, clock, 5)
  with chrono.measure("evaluate"):
    clock.now += 1000
  take_steps(chrono, clock, 5)
  rates = chrono.rates(11)
  assert rates == Rates(8.0, 0.25, 1.0, 89.0, 10 * 4 / 3600, rates.goodput)
  # The next window starts anew; the ETA uses the session's mean.
  take_steps(chrono, clock, 10, wait=0, compute=3)
  rates = chrono.rates(21)
  assert rates.images_per_second == pytest.approx(8 / 3)
  assert rates.wait == 0
  assert rates.eta == pytest.approx(79 * 2.0)
  times = dict(train=40.0, wait=2.5, compile=32.0, evaluate=1000.0)
  times |= dict(device=160.0, wall=1e9 + clock.now)
  assert {k: v for k, v in chrono.to_dict().items() if v} == times


def test_chrono_survives_a_resume(clock):
  first = make_chrono(clock)
  take_steps(first, clock, 11)
  saved = json.loads(json.dumps(first.to_dict()))
  clock.now += 10_000  # Time between sessions is not training.
  second = make_chrono(clock, devices=8)
  second.from_dict(saved)
  take_steps(second, clock, 1, wait=0, compute=5)
  take_steps(second, clock, 10, wait=0, compute=0.5)
  rates = second.rates(22)
  assert rates.core_hours == pytest.approx((10 * 4 + 5 * 8) / 3600)
  assert rates.eta == pytest.approx(78 * 0.5)
  assert second.to_dict()["compile"] == 6.0
  assert second.to_dict()["train"] == 15.0
  second.from_dict({})  # A checkpoint of an older version.
  assert second.rates(22).core_hours == 0


def test_chrono_eta_is_zero_at_the_end(clock):
  chrono = make_chrono(clock, total_steps=2)
  take_steps(chrono, clock, 2)
  assert chrono.rates(2).eta == 0


def test_goodput_is_the_share_of_wall_time_over_restarts(clock):
  first = make_chrono(clock)
  clock.now += 4.0  # Opens the data.
  take_steps(first, clock, 1, wait=1, compute=9)
  take_steps(first, clock, 10)
  with first.measure("save"):
    saved = json.loads(json.dumps(first.to_dict()))
    clock.now += 2.0
  goodput = first.rates(11).goodput
  expected = dict(start=4, compile=10, step=7.5, wait=2.5, save=2)
  for kind, seconds in expected.items():
    assert goodput[kind] == pytest.approx(seconds / 26), kind
  assert goodput["lost"] == goodput["evaluate"] == goodput["measure"] == 0
  # Killed after 8 seconds of further steps; restarted 90 seconds later.
  take_steps(first, clock, 8)
  clock.now += 90.0
  second = make_chrono(clock)
  clock.now += 3.0  # Restores the checkpoint.
  second.from_dict(saved)
  clock.now += 6.0  # Opens the data.
  take_steps(second, clock, 1, wait=0, compute=10)
  take_steps(second, clock, 10)
  with second.measure("measure"):
    clock.now += 4.0
  goodput = second.rates(22).goodput
  assert sum(goodput.values()) == pytest.approx(1.0)
  # The checkpoint holds the 24 seconds before its save.
  expected = dict(
    start=4 + 6, compile=20, step=15, wait=5, save=0, measure=4, lost=103
  )
  for kind, seconds in expected.items():
    assert goodput[kind] == pytest.approx(seconds / 157), kind


def test_clocks_of_two_machines_may_differ(clock):
  first = make_chrono(clock)
  take_steps(first, clock, 2)
  second = make_chrono(clock, wall_clock=lambda: 0.0)
  second.from_dict(first.to_dict())
  assert second.to_dict()["lost"] == 0
