"""Benchmark harness: timing in alternating rounds, and result tables.

The parameters of a benchmark become flags of its command, see
`mtv_jax.cli.bench`. Does not import JAX.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mtv_jax.utils.errors import InputError


class BenchResult:
  """A table to print, titled by `context`, and values for `--json`."""

  def __init__(self, **context: Any):
    self.values = context | {"processor": describe_processor()}
    self._title = ", ".join(
      f"{name.replace('_', ' ')} {value}" for name, value in self.values.items()
    )
    self._rows: list[tuple[str, str]] = []

  def add(
    self,
    name: str,
    value: Any,
    label: str = "",
    text: str = "",
    unit: float = 1,
  ) -> None:
    """Adds a JSON value, and a table row if labelled.

    A replacement field in `text`, such as '{:.1f}', formats `value / unit`.
    """
    self.values[name] = value
    if label:
      text = text.format(value / unit) if "{" in text else text
      self._rows.append((label, text))

  def add_ratio(
    self,
    name: str,
    numerators: Iterable[float],
    denominators: Iterable[float],
    label: str,
    spec: str,
  ) -> None:
    """Adds the median ratio as `name`, all rounds' ratios as `f"{name}s"`."""
    rounds = zip(numerators, denominators, strict=True)
    ratios = [float(a) / float(b) for a, b in rounds]
    median, low, high = (f(ratios) for f in (statistics.median, min, max))
    text = f"{median:{spec}} ({low:{spec}} to {high:{spec}}"
    self.add(name, median, label, f"{text} in {len(ratios)} rounds)")
    self.add(f"{name}s", ratios)

  def __getitem__(self, name: str) -> Any:
    return self.values[name]

  def __str__(self) -> str:
    width = max(len(label) for label, _ in self._rows)
    rows = (f"{label:{width}}  {text}" for label, text in self._rows)
    return "\n".join([self._title, *rows])

  def to_json(self) -> str:
    """The values as one line of JSON."""
    return json.dumps(self.values)


def describe_processor(info: str | None = None) -> str:
  """Reads the processor's name and AVX-512 support from /proc/cpuinfo."""
  path = pathlib.Path("/proc/cpuinfo")
  if info is None:
    info = path.read_text() if path.exists() else ""
  fields = dict(re.findall(r"^([^\t:]+)\t*: *(.*)$", info, re.MULTILINE))
  name = fields.get("model name") or platform.processor() or platform.machine()
  has = "with" if "avx512f" in fields.get("flags", "").split() else "without"
  return f"{name} {has} AVX-512"


class Stopwatch:
  """Wall and CPU seconds of a block; CPU time ignores the machine's load."""

  wall = cpu = 0.0

  def __enter__(self) -> Stopwatch:
    self._start = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *exception: object) -> None:
    self.wall = time.perf_counter() - self._start[0]
    self.cpu = time.process_time() - self._start[1]


def time_call(function: Callable[[], Any], clock: str = "wall") -> float:
  """Times a call in "wall" or "cpu" seconds; `function` must block."""
  with Stopwatch() as watch:
    function()
  return getattr(watch, clock)


def time_rounds(
  functions: Sequence[Callable[[], Any]],
  *,
  rounds: int,
  warmup: int = 1,
  clock: str = "wall",
) -> np.ndarray:
  """Times blocking functions in turn; seconds `[rounds, functions]`.

  Alternating exposes all functions to equal load, for ratios within a round.
  """
  turns = range(warmup + rounds)
  times = [[time_call(f, clock) for f in functions] for _ in turns]
  return np.array(times[warmup:])


def import_oracle(name: str) -> ModuleType:
  """Imports a PyTorch reference from tools/, which wheels lack."""
  path = pathlib.Path(__file__).resolve().parents[3] / "tools" / f"{name}.py"
  if not path.is_file():
    raise InputError(f"The comparison needs a checkout, with tools/{name}.py.")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except ImportError as error:
    raise ImportError(
      "The comparison needs PyTorch and its packages: pip install"
      f" 'mtv_jax[reference]' ({error})."
    ) from error
  return module


def describe_devices() -> str:
  """Describes number and kind of the devices."""
  import jax

  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
