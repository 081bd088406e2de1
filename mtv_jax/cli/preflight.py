"""What tools/preflight.py does; it starts JAX on the CPU."""

from __future__ import annotations

import json as json_lib
import pathlib
from collections.abc import Iterable, Sequence

from mtv_jax.config import overrides, schema
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import pages, report, scaling
from mtv_jax.perf.preflight import propose as propose_lib


def run(
  config: str,
  topology: str,
  *,
  changes: Iterable[str] = (),
  json: pathlib.Path | None = None,
  tables: str = "short",
  propose: bool = False,
  mfu: float = report.MFU,
  examples: int | None = None,
  norms: bool = False,
) -> bool:
  """Prints whether a config fits a machine, and all there is to know of it.

  Args:
    config: a file, its arguments after a colon.
    topology: see `topologies.parse`.
    changes: 'KEY=VALUE', in order.
    json: where the report is written too.
    tables: 'short' or 'all' rows of the parameters.
    propose: whether to try what would fit, where it does not.
    mfu: assumed share of the chips' peak.
    examples: of an epoch.
    norms: whether to compile the objectives' gradient norms too.

  Returns:
    Whether it fits.
  """
  topologies.use_cpu(topology)
  read = overrides.override(schema.read_config(config), changes)
  made = report.preflight(
    read,
    topology,
    mfu=mfu,
    tables=tables,
    examples_per_epoch=examples,
    norms=norms,
  )
  print(made)
  if json:
    json.write_text(made.to_json() + "\n")
  if not made.measured.fits and propose:
    print("\nwhat would fit, compiled:")
    for proposal in _propose(read, topology):
      print(f"  {proposal}", flush=True)
  elif not made.measured.fits:
    print("\n--propose compiles changes until one fits.")
  return made.fits


def _propose(config, topology):
  found = propose_lib.propose(config, topology)
  return found or ["nothing that was tried."]


def table(page: pathlib.Path, *, rows: Sequence[str] = ()) -> str:
  """Compiles the table's configs, and writes it into a page."""
  topologies.use_cpu()
  return pages.write(page, rows=rows)


def scaling_of_losses(json: pathlib.Path | None = None) -> str:
  """The sigmoid loss alone, ring and gathered, on 16, 64 and 256 chips.

  Args:
    json: where the rows are written too.
  """
  topologies.use_cpu()
  return _table(scaling.losses(), json)


def scaling_of_step(
  config: str, changes: Iterable[str], json: pathlib.Path | None = None
) -> str:
  """A config's step on 16, 64 and 256 chips at a constant batch a chip.

  Args:
    config: a file, its arguments after a colon.
    changes: 'KEY=VALUE', in order.
    json: where the rows are written too.
  """
  topologies.use_cpu()
  read = overrides.override(schema.read_config(config), changes)
  return _table([scaling.step(read, name) for name in scaling.TOPOLOGIES], json)


def _table(rows, path: pathlib.Path | None) -> str:
  if path:
    path.write_text(json_lib.dumps(scaling.to_dict(rows)) + "\n")
  return scaling.table(rows)
