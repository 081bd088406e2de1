"""How far a long job is, on the terminal or in a log."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 20


class Progress:
  """Says how many items are done, how many a second, and the time left.

  On a terminal that is a bar in one line; elsewhere a line every ten seconds.
  What was done before the first call does not count into the pace, and neither
  does the time to the first news after it, in which programs are compiled.

  Args:
    unit: what is counted.
    stream: where it is written, standard error by default.
    clock: seconds, from anywhere.
  """

  def __init__(
    self,
    *,
    unit: str = "images",
    stream: TextIO | io.StringIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._unit = unit
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._tty = self._stream.isatty()
    self._said = clock()
    # (seconds, items): at the start, and at the first news.
    self._marks: list[tuple[float, int]] = []
    self._line = 0

  def __call__(self, done: int, total: int) -> None:
    """Says it where it is due: now and then, and at the end.

    Args:
      done: items so far, with those of earlier runs and of other hosts.
      total: all of them.
    """
    now = self._clock()
    if len(self._marks) < 2 and (not self._marks or done > self._marks[-1][1]):
      self._marks.append((now, done))
    if now - self._said < (0.5 if self._tty else 10) and done < total:
      return
    self._said = now
    self._say(done, total, self._pace(now, done))

  def _pace(self, now: float, done: int) -> float:
    """Items a second; NaN before it is known."""
    for seconds, items in reversed(self._marks):
      if done > items and now > seconds:
        return (done - items) / (now - seconds)
    return math.nan

  def _say(self, done: int, total: int, pace: float) -> None:
    known = math.isfinite(pace)
    # Rounded down: 100 % is for all of them alone.
    percent = f"{1000 * done // max(total, 1) / 10:5.1f}%"
    count = f"{done:,} of {total:,} {self._unit}"
    speed = f"{pace:,.0f} a second" if pace >= 10 else f"{pace:.1f} a second"
    eta = duration((total - done) / pace if known else math.nan)
    left = [f"eta {eta}"] if done < total else []
    tail = [count, *([speed] if known else []), *left]
    if not self._tty:
      print(percent.strip(), *tail, sep=", ", file=self._stream, flush=True)
      return
    full = _WIDTH * done // max(total, 1)
    bar = "#" * full + "." * (_WIDTH - full)
    text = f"{percent} [{bar}] {'  '.join(tail)}"
    pad = " " * (self._line - len(text))
    self._line = len(text)
    end = "\n" if done >= total else "\r"
    print(text + pad, end=end, file=self._stream, flush=True)


def duration(seconds: float) -> str:
  """Two units: 42s, 3m12s, 5h07m, 2d03h; '?' where unknown."""
  if not math.isfinite(seconds):
    return "?"
  left = round(seconds)
  for unit, size, lower, smaller in [
    ("d", 86400, "h", 3600),
    ("h", 3600, "m", 60),
    ("m", 60, "s", 1),
  ]:
    if left >= size:
      return f"{left // size}{unit}{left % size // smaller:02d}{lower}"
  return f"{left}s"
