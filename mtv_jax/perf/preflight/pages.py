"""The table of docs/pods.md: which config fits which machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Sequence

from mtv_jax.config import schema
from mtv_jax.perf import hlo
from mtv_jax.perf.preflight import report as report_lib
from mtv_jax.utils.errors import ConfigError

BEGIN, END = "<!-- fits: begin -->", "<!-- fits: end -->"
NOTE = """
`python tools/preflight.py --table=docs/pods.md` compiles these and writes this
table; `--rows WORD ...` does some of them. Peak HBM is the compiler's plan, of
what it has to give. PFLOPs are the recipe's own, by analysis, each product
once; useful is their share in the products of the compiled program, loops
multiplied. Received: all collectives of a step, with ring algorithms. libtpu:
the release of the compiler."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table: a config on a topology."""

  config: str
  topology: str

  def __str__(self) -> str:
    return f"{pathlib.Path(self.config).stem} {self.topology}"


ROWS = (
  Row("configs/mtv_b16_224.py", "v5e:16x16"),
  Row("configs/mtv_l16_256.py", "v5e:16x16"),
  Row("configs/mtv_l16_256.py", "v4:4x4x8"),
  Row("configs/mtv_l16_256.py", "v5p:4x4x8"),
  Row("configs/mtv_g14_224.py", "v5e:16x16"),
)
_HEAD = (
  "| config | machine | batch | peak HBM a chip | of | PFLOPs a step "
  "| useful | received a chip | libtpu |"
)


def line(row: Row, found: report_lib.Report) -> str:
  """A row of the table from its report."""
  memory = found.measured.memory
  if memory is None:
    peak, of = "does not fit", ""
  else:
    peak, of = f"{memory.peak / 2**30:.1f} GiB", ""
    if memory.limit:
      of = f"{memory.limit / 2**30:.2f} GiB"
  kinds = hlo.by_kind(found.measured.collectives)
  received = sum(size for _, size in kinds.values()) / 1e9
  useful = f"{found.useful:.0%}" if found.useful else "-"
  cells = [
    pathlib.Path(row.config).stem,
    row.topology,
    f"{found.plan.config.batch_size:,}",
    peak,
    of,
    f"{found.model_flops / 1e15:.2f}",
    useful,
    f"{received:.2f} GB",
    importlib.metadata.version("libtpu") if found.plan.topology.is_tpu else "",
  ]
  return "| " + " | ".join(cells) + " |"


def replace(text: str, lines: Sequence[str]) -> str:
  """A page's text with other lines between the markers.

  Raises:
    ConfigError: where the page lacks them.
  """
  if BEGIN not in text or END not in text:
    raise ConfigError(
      f"the page has no lines {BEGIN} and {END}: the table goes between them."
    )
  before, _, rest = text.partition(BEGIN)
  _, _, after = rest.partition(END)
  return "\n".join([before + BEGIN, *lines, END + after])


def merge(text: str, made: Sequence[tuple[Row, str]]) -> list[str]:
  """The table's lines: those just made, and the page's own for the others."""
  _, _, rest = text.partition(BEGIN)
  old = rest.partition(END)[0].splitlines()
  new = {str(row): line for row, line in made}
  lines = [_HEAD, "| " + " | ".join(["---"] * (_HEAD.count("|") - 1)) + " |"]
  for row in ROWS:
    start = f"| {pathlib.Path(row.config).stem} | {row.topology} |"
    kept = [line for line in old if line.startswith(start)]
    lines += [new[str(row)]] if str(row) in new else kept
  return [*lines, *NOTE.splitlines()]


def write(page: pathlib.Path, *, rows: Sequence[str] = ()) -> str:
  """Compiles the table's rows and writes it into a page.

  Args:
    page: with the markers.
    rows: words; only rows that have them all are compiled, and the others
      stay as they are.

  Returns:
    The table.
  """
  text = page.read_text(encoding="utf-8")
  made = []
  for row in ROWS:
    if all(word in str(row) for word in rows):
      config = schema.read_config(row.config)
      made.append((row, line(row, report_lib.preflight(config, row.topology))))
  lines = merge(text, made)
  page.write_text(replace(text, lines), encoding="utf-8")
  return "\n".join(lines)
