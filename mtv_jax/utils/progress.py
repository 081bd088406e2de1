"""Progress of long jobs: a tqdm bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tqdm

T = TypeVar("T")


class _Lines(tqdm.tqdm):
  """A progress bar that writes new lines instead of overwriting one."""

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    """Writes the state as one line."""
    # `close` passes pos=0 and ends the line itself.
    self.fp.write(f"{msg or self}" + ("" if pos == 0 else "\n"))
    self.fp.flush()


class Progress:
  """A progress bar; call it with the number of completed items.

  Items completed before the first call don't count towards the rate.
  """

  def __init__(self, *, unit: str = "images", description: str | None = None):
    kind, every, meter = tqdm.tqdm, 0.5, "|{bar}| "
    if not sys.stderr.isatty():
      kind, every, meter = _Lines, 10.0, ""
    count = "{n:,} of {total:,}{unit}, {rate_fmt}, {remaining} left"
    self._bar: Any = None
    self._make_bar = functools.partial(
      kind,
      desc=f"{description}: " if description else "",
      unit=f" {unit}",
      file=sys.stderr,
      mininterval=every,
      bar_format="{desc}{percentage:3.0f}% " + meter + count,
    )

  def __call__(self, done: int, total: int) -> None:
    """Updates the bar to `done` items, over all runs and hosts."""
    if self._bar is None:
      self._bar = self._make_bar(total=total, initial=done)
    self._bar.total = total
    self._bar.update(done - self._bar.n)
    if done >= total:
      self._bar.close()


def track(items: Sequence[T], description: str, *, unit: str) -> Iterator[T]:
  """Yields items while showing a progress bar."""
  report = Progress(unit=unit, description=description)
  report(0, max(len(items), 1))
  for done, item in enumerate(items, 1):
    yield item
    report(done, len(items))
