"""Benchmark harness: timing in alternating rounds, result tables, flags.

A benchmark is a module with a function `run`, whose parameters are the flags of
its command and which returns a `Result`; `mtv_jax.cli.bench` lists them. This
module does not import JAX, which the input pipeline does not need.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


class Result:
  """Measurements of one benchmark: a table to print and values for `--json`.

  Args:
    **context: values that describe the run, such as `batch_size`; the title of
      the table.
  """

  def __init__(self, **context: Any):
    self.values = context
    self._title = ", ".join(
      f"{name.replace('_', ' ')} {value}" for name, value in context.items()
    )
    self._rows: list[tuple[str, str]] = []

  def add(self, name: str, value: Any, label: str = "", text: str = "") -> None:
    """Adds a value, and a row of the table if it has a label.

    Args:
      name: key of the value in JSON.
      value: of plain types.
      label: what was measured.
      text: the value with its unit, as printed.
    """
    self.values[name] = value
    if label:
      self._rows.append((label, text))

  def __getitem__(self, name: str) -> Any:
    return self.values[name]

  def __str__(self) -> str:
    width = max(len(label) for label, _ in self._rows)
    rows = (f"{label:{width}}  {text}" for label, text in self._rows)
    return "\n".join([self._title, *rows])

  def to_json(self) -> str:
    """The values as one line of JSON."""
    return json.dumps(self.values)


class Stopwatch:
  """Wall and processor seconds of a `with` block.

  Processor time does not grow with what other programs take of the machine.
  """

  wall = cpu = 0.0

  def __enter__(self) -> Stopwatch:
    self._start = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *exception: object) -> None:
    self.wall = time.perf_counter() - self._start[0]
    self.cpu = time.process_time() - self._start[1]


def time_call(function: Callable[[], Any]) -> float:
  """Wall seconds of a call, which must wait for its own results."""
  with Stopwatch() as watch:
    function()
  return watch.wall


def time_rounds(
  functions: Sequence[Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> np.ndarray:
  """Wall seconds `[rounds, functions]` of functions that take turns.

  Alternating exposes all of them to the same load of the machine, so that the
  ratios of a round are comparable.

  Args:
    functions: which wait for their own results.
    rounds: of one call each.
    warmup: further rounds before these, which do not count.
  """
  times = [[time_call(f) for f in functions] for _ in range(warmup + rounds)]
  return np.array(times[warmup:])


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Ratios of alternating rounds: their median and all of them."""

  median: float
  rounds: tuple[float, ...]

  @classmethod
  def of(cls, over: Iterable[float], under: Iterable[float]) -> Ratio:
    """Divides the measurements of each round."""
    rounds = tuple(
      float(a) / float(b) for a, b in zip(over, under, strict=True)
    )
    return cls(statistics.median(rounds), rounds)

  def format(self, spec: str) -> str:
    """The median and the range, such as '1.05 (0.98 to 1.12 in 5 rounds)'."""
    low, high = min(self.rounds), max(self.rounds)
    return (
      f"{self.median:{spec}} ({low:{spec}} to {high:{spec}} in "
      f"{len(self.rounds)} rounds)"
    )


def add_flags(
  parser: argparse.ArgumentParser, function: Callable[..., Any]
) -> None:
  """Adds a flag for each parameter of a function.

  Defaults and types are those of the signature, help texts those of the
  docstring. A parameter without a default is required, and an integer is at
  least 1 (0 where that is the default).
  """
  section = inspect.getdoc(function).partition("Args:\n")[2]
  section = section.partition("\n\n")[0]
  helps = dict(
    re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
  )
  for name, parameter in inspect.signature(function).parameters.items():
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    integer = "int" in str(parameter.annotation)
    parser.add_argument(
      f"--{name}",
      required=required,
      default=default,
      type=functools.partial(_integer, int(default != 0)) if integer else str,
      help=" ".join(helps[name].split()).replace("%", "%%"),
    )


def _integer(least: int, text: str) -> int:
  value = int(text)
  if value < least:
    raise argparse.ArgumentTypeError(f"{value}: expected at least {least}")
  return value
