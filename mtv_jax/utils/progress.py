"""Progress of long jobs: a tqdm bar on a terminal, plain lines elsewhere.

`report_silence` writes a line if a command has written none for 10 s. It names
the innermost `activity`, such as the compilation of a step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tqdm

from mtv_jax.utils.text import format_duration

T = TypeVar("T")

LINE_INTERVAL_SECONDS = 10.0
_COUNT = "{n:,} of {total:,}{unit}, {rate_fmt}, {remaining} left"


class _Bar(tqdm.tqdm):
  """A progress bar; off a terminal, it writes lines instead."""

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    """Draws the bar, or writes a line."""
    note_output()
    if sys.stderr.isatty():
      super().display(msg, pos)
      return
    # `close` passes pos=0 and ends the line itself.
    self.fp.write(f"{msg or self}" + ("" if pos == 0 else "\n"))
    self.fp.flush()


class Progress:
  """A progress bar; call it with the number of completed items.

  Items completed before the first call don't count towards the rate.
  """

  def __init__(self, *, unit: str = "images"):
    self._bar: Any = None
    self._make_bar = _make_bar_factory("", unit)

  def __call__(self, done: int, total: int) -> None:
    """Updates the bar to `done` items, over all runs and hosts."""
    if self._bar is None:
      self._bar = self._make_bar(total=total, initial=done)
    self._bar.total = total
    self._bar.update(done - self._bar.n)
    if done >= total:
      self._bar.close()


def _make_bar_factory(description: str, unit: str) -> functools.partial[Any]:
  is_tty = sys.stderr.isatty()
  return functools.partial(
    _Bar,
    desc=f"{description}: " if description else "",
    unit=f" {unit}",
    file=sys.stderr,
    disable=_is_muted,
    mininterval=0.5 if is_tty else LINE_INTERVAL_SECONDS,
    bar_format="{desc}{percentage:3.0f}% " + "|{bar}| " * is_tty + _COUNT,
  )


def track(items: Sequence[T], description: str, *, unit: str) -> Iterator[T]:
  """Yields items and shows a progress bar, unless the job is short.

  On a terminal, the bar appears after 1 s and disappears at the end. A log gets
  a line every 10 s.
  """
  make_bar, is_tty = _make_bar_factory(description, unit), sys.stderr.isatty()
  delay = 1.0 if is_tty else LINE_INTERVAL_SECONDS
  yield from make_bar(items, leave=not is_tty, delay=delay)


# (what, start, can_exit) of the jobs in progress, the innermost last.
_jobs: list[tuple[Callable[[], str], float, bool]] = []
_last_output = 0.0
_is_muted = False


def mute() -> None:
  """Silences this process's bars and `report_silence`: another prints them."""
  global _is_muted
  _is_muted = True


def note_output() -> None:
  """Tells `report_silence` that a line has been written."""
  global _last_output
  _last_output = time.monotonic()


@contextlib.contextmanager
def activity(
  what: str | Callable[[], str], *, can_exit: bool = False
) -> Iterator[None]:
  """Names the job that `report_silence` reports inside this context.

  `can_exit`: the process may exit inside it without cleaning up, for example
  while it compiles.
  """
  name = what if callable(what) else lambda: what
  job = (name, time.monotonic(), can_exit)
  _jobs.append(job)
  try:
    yield
  finally:
    _jobs.remove(job)


def can_exit() -> bool:
  """Whether the innermost activity allows an exit without cleaning up."""
  return bool(_jobs) and _jobs[-1][2]


@contextlib.contextmanager
def report_silence(program: str) -> Iterator[None]:
  """Writes a line to standard error after each interval without output."""
  stopped, start = threading.Event(), time.monotonic()
  note_output()

  def watch() -> None:
    while not stopped.wait(LINE_INTERVAL_SECONDS / 10):
      if _is_muted or time.monotonic() - _last_output < LINE_INTERVAL_SECONDS:
        continue
      what, since, _ = _jobs[-1] if _jobs else (lambda: "running", start, 0)
      elapsed = format_duration(time.monotonic() - since)
      with contextlib.suppress(OSError, ValueError):  # A closed terminal.
        print(f"{program}: {what()}, {elapsed}", file=sys.stderr, flush=True)
      note_output()

  thread = threading.Thread(target=watch, name="silence", daemon=True)
  thread.start()
  try:
    yield
  finally:
    stopped.set()
    thread.join()
