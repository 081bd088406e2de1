"""Short text formats for numbers and names."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

Number = int | float


def one_line(text: str) -> str:
  """Collapses whitespace and replaces unprintable characters."""
  text = " ".join(text.split())
  return "".join(c if c.isprintable() else "\ufffd" for c in text)


def truncate(text: str, limit: int) -> str:
  """Truncates text longer than `limit` characters, with an ellipsis."""
  return text if len(text) <= limit else f"{text[:limit]}…"


def list_first(names: Sequence[str], limit: int) -> str:
  """The first `limit` names, and the number of further names."""
  more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def first_lines(lines: Sequence[str], limit: int) -> str:
  """The first `limit` lines, indented, and the number of further lines."""
  shown = [f"  {line}" for line in lines[:limit]]
  if len(lines) > limit:
    shown.append(f"  ... and {len(lines) - limit:,} more")
  return "\n".join(shown)


def format_setting(value: Any, limit: int) -> str:
  """A string, or a value as JSON, truncated to `limit` characters."""
  text = value if isinstance(value, str) else json.dumps(value, default=str)
  return truncate(text, limit)


def file_name(*parts: str) -> str:
  """Builds a file name of letters, digits, dots, hyphens and underscores."""
  parts = [re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts]
  return "_".join(part or "unnamed" for part in parts)


def align_columns(
  rows: Sequence[Sequence[str]], left: Sequence[int]
) -> list[str]:
  """Lines of a text table, right-aligned except for the columns in `left`."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  template = "  ".join(
    f"{{:{'<' if i in left else '>'}{w}}}" for i, w in enumerate(widths)
  )
  return [template.format(*row).rstrip() for row in rows]


def format_number(value: Number) -> str:
  """Short number format: 3.412, 0.431, 1234.5, 96, 8.1e-04, nan."""
  if not math.isfinite(value):
    return str(value)
  if value == int(value) and abs(value) < 1e6:
    return str(int(value))
  if not 0.01 <= abs(value) < 1e5:
    return f"{value:.1e}"
  return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def format_short(value: Number) -> str:
  """Number with a unit prefix: 0.25, 400, 12k, 1.5M, 2e-05."""
  if value == 0:
    return "0"
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.3g}{unit}"
  return f"{value:.4g}" if abs(value) < 0.001 else f"{round(value, 6):g}"


def format_metric(
  value: Number | None,
  unit: str,
  error: Number | None = None,
  *,
  digits: int = 2,
  signed: bool = False,
) -> str:
  """A metric without its unit; `71.30 ± 0.92` with a standard error.

  Percentages have `digits` decimals, most other numbers three. `signed` is for
  differences.
  """
  if value is None:
    return "-"
  sign = "+" if signed else ""
  if unit == "%":
    spec = f".{digits}f"
  elif value == 0 or 0.01 <= abs(value) < 1000:
    spec = ".3f"
  else:
    spec = ".2g" if signed and abs(value) < 1 else ".4g"
  text = format(value, sign + spec)
  text = f"\u2212{text[1:]}" if text.startswith("-") else text
  if error is None:
    return text
  return f"{text} ± {error:{spec if unit == '%' else '.2g'}}"


def format_percent(fraction: Number | None) -> str:
  """A fraction in percent; below 1 % with two significant digits."""
  if fraction is None:
    return "none"
  value = 100 * fraction
  return f"{value:.2g} %" if 0 < value < 1 else f"{value:.1f} %"


def format_bytes(count: Number) -> str:
  """A size in powers of 1024: 12 B, 3.4 KiB, 1.25 GiB."""
  for unit in ("B", "KiB", "MiB"):
    if abs(count) < 1024:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.2f} GiB"


def format_duration(seconds: Number) -> str:
  """Two units: 42s, 3m12s, 5h07m, 2d03h; '?' if not finite."""
  if not math.isfinite(seconds):
    return "?"
  left, units = round(seconds), [(86400, "d"), (3600, "h"), (60, "m"), (1, "s")]
  for (size, unit), (small_size, small_unit) in itertools.pairwise(units):
    if left >= size:
      return f"{left // size}{unit}{left % size // small_size:02d}{small_unit}"
  return f"{left}s"
