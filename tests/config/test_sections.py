"""Sections of a config, and durations."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from mtv_jax.config import sections
from mtv_jax.config.durations import (
  Duration,
  PositiveDuration,
  RunLength,
  TotalDuration,
)
from mtv_jax.config.options import NonNegativeFloat, PositiveInt
from mtv_jax.utils.errors import ConfigError


def test_config_imports_no_jax():
  modules = "durations, op_strings, options, overrides, recipes, sections"
  code = (
    f"import sys; from mtv_jax.config import {modules};"
    "sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'tensorflow')))"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
  ("duration", "expected"),
  [
    (None, None),
    (Duration(7), 7),
    (Duration(0), 0),
    (Duration(1, "epochs"), 5),  # 313 / 64 = 4.89
    (Duration(2.5, "epochs"), 12),  # 12.2
    (Duration(1e-9, "epochs"), 1),  # Asked for, so not nothing.
    (Duration(6400, "examples"), 100),
    (Duration(10, "percent"), 200),
    (Duration(0, "percent"), 0),
  ],
)
def test_steps(duration, expected):
  run = RunLength(batch_size=64, examples_per_epoch=313, total_steps=2000)
  assert run.steps(duration) == expected


def test_a_length_that_is_not_known():
  epochs = Duration(1, "epochs", name="config.total")
  assert RunLength.of_total(epochs, 64, 313).total_steps == 5
  match = "config.total_epochs: the data's length is unknown; use total_steps"
  with pytest.raises(ConfigError, match=match):
    RunLength.of_total(epochs, 64)
  with pytest.raises(ConfigError, match="_percent needs a run of known length"):
    RunLength(8).steps(Duration(1, "percent"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  """A nested section."""

  value: NonNegativeFloat = 1.0
  start: Duration | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A named entry with further options."""

  type: str
  weight: NonNegativeFloat | Inner = 1.0
  bound: float | None = sections.sparse(None)
  options: Mapping[str, Any] = sections.further_options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  """Every kind of field."""

  size: PositiveInt
  total: TotalDuration
  every: PositiveDuration = Duration(50)
  warmup: Duration = Duration(0)
  later: Duration | None = None
  name: str = "a"
  rules: tuple[Any, ...] = ()
  inner: Inner
  optional: Inner | None = None
  entries: Mapping[str, Entry]
  parts: Any = sections.derived()


SMALL = {"size": 8, "total_steps": 10}
ENTRIES = {
  "other": {"type": "depth", "weight": {"start_percent": 5}, "bound": 2},
  "gone": None,
  "depth": {"scales": 3},
}


def read(**changes):
  return sections.read(Outer, {**SMALL, **changes}, "config")


def test_absent_keys_have_their_defaults():
  outer = read(name=None, inner=None, later_steps=None)
  assert outer == Outer(size=8, total=Duration(10), inner=Inner(), entries={})
  assert outer.every.name == "config.every"
  assert sections.to_dict(outer) == {
    "size": 8, "total_steps": 10, "every_steps": 50, "warmup_steps": 0,
    "name": "a", "rules": [], "inner": {"value": 1.0}, "optional": None,
    "entries": {},
  }  # fmt: skip


def test_given_values_and_units_are_read_and_written_back():
  given = dict(
    warmup_percent=5,
    later_epochs=1.5,
    rules=[("x", {"lr": 0})],
    inner={"value": 2},
    optional={"start_examples": 64},
    entries=ENTRIES,
  )
  outer = read(**given)
  assert outer.warmup == Duration(5, "percent")
  assert outer.later == Duration(1.5, "epochs")
  assert outer.optional.start == Duration(64, "examples")
  depth, other = outer.entries["depth"], outer.entries["other"]
  assert depth == Entry(type="depth", options={"scales": 3})
  assert other.weight.start == Duration(5, "percent") and other.bound == 2.0
  assert list(outer.entries) == ["depth", "other"]
  written = json.loads(json.dumps(sections.to_dict(outer)))
  assert written == sections.to_dict(outer)
  assert written["warmup_percent"] == 5 and "warmup_steps" not in written
  assert written["entries"]["depth"] == {
    "type": "depth", "weight": 1.0, "scales": 3,
  }  # fmt: skip
  again = sections.read(Outer, written, "config")
  assert sections.to_dict(again) == written


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"siz": 1}, "config.siz is an unknown key. Did you mean 'size'"),
    ({"every_epoch": 1}, "every_epoch is an.*Did you mean 'every_epochs'"),
    ({"parts": 1}, "config.parts is an unknown key"),
    ({"total_percent": 3}, "config.total_percent is an unknown key"),
    ({"size": None}, "config.size is missing; it has no default"),
    ({"size": "8"}, "config.size is '8', expected an integer >= 1"),
    ({"total_epochs": 3}, "got total_steps=10, total_epochs=3"),
    ({"total_steps": None}, "exactly one of total_steps.*got none"),
    ({"total_steps": 0}, "config.total_steps is 0, expected a number > 0"),
    ({"total_steps": "3"}, "config.total_steps is '3'"),
    ({"warmup_steps": -2}, "config.warmup_steps is -2, expected a number >= 0"),
    ({"warmup_steps": 1.5}, "warmup_steps is 1.5, expected a whole number"),
    ({"warmup_steps": True}, "config.warmup_steps is True"),
    ({"every_epochs": 0}, "config.every_epochs is 0, expected a number > 0"),
    ({"inner": 3}, "config.inner is 3, expected a section"),
    ({"optional": 3}, "config.optional is 3, expected a section"),
    ({"optional": {"x": 1}}, "config.optional.x is an unknown key"),
    ({"entries": [1]}, r"config.entries is \[1\], expected named entries"),
    ({"entries": {"a": 3}}, "config.entries.a is 3, expected a section"),
    ({"entries": {"a": {"weight": -1.0}}}, "a.weight is -1.0, expected a numb"),
    ({"entries": {"a": {"weight": {"b": 1}}}}, "a.weight.b is an unknown key"),
  ],
)
def test_errors_name_the_key(changes, message):
  with pytest.raises(ConfigError, match=message):
    read(**changes)
