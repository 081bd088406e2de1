"""Compiles a config's train step ahead of time for a TPU or GPU topology.

  mtv-jax preflight --config=mtv_b16_224 --topology=v5e:16x16

Needs no data, weights or TPU: pip install 'mtv_jax[preflight]' installs the TPU
compiler. Prints the batch, parameters, sharding, collectives, memory and FLOPs
per chip, the required input throughput, and hours, chip-hours and price of the
run. Exits with 1 if the step, or the program of gradient norms that its balance
needs, does not fit; --propose then compiles changes until the step fits.
--config.model.remat=auto finds the least recomputation that fits. Override
config keys with --config.KEY=VALUE.

  mtv-jax preflight --config=mtv_b16_224 --topology=v5e:16x16 --data

opens the config's data and also reports the requests, bytes and memory that
it needs, computed from the tables of blocks.

  mtv-jax preflight --table=docs/pods.md

compiles each config of the page's table and updates the table.

  mtv-jax preflight --scaling=step --config=mtv_b16_224

compiles one step for 16, 64 and 256 v5e chips at 64 rows per chip and reports
the growth of memory and collectives. --scaling=loss compiles only the sigmoid
loss. Both also write --json.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from mtv_jax.cli import arguments
from mtv_jax.config import overrides, recipes
from mtv_jax.models.remat import AUTO
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.progress import track


class Flags(arguments.ConfigFlags):
  """Flags of `mtv-jax preflight`.

  Args:
    config: recipe file or name, with its arguments after a colon.
    topology: such as v5e:16x16, v4:4x4x8 or gpu:8xH100.
    json: also write the result to this file.
    tables: print all parameters.
    propose: compile changes until one fits.
    norms: also compile the objectives' gradient norms, even if only
      config.log or config.interference measures them.
    budget: GiB per chip for --config.model.remat=auto; default: 95 % of memory.
    mfu: assumed model FLOPs utilization.
    chip_hour: dollars per chip and hour, for the price of the run.
    examples: examples per epoch.
    data: also open the config's data, and report its requests and bytes.
    step_seconds: a measured time of a step, in place of --mfu.
    table: update the table in this page.
    rows: update only rows that contain all these words.
    scaling: compile for 16 to 256 chips.
  """

  config: str | None = None
  topology: str | None = None
  json: pathlib.Path | None = None
  tables: bool = False
  propose: bool = False
  norms: bool = False
  budget: float | None = None
  mfu: float = 0.4
  chip_hour: float | None = None
  examples: int | None = None
  data: bool = False
  step_seconds: float | None = None
  table: pathlib.Path | None = None
  rows: Sequence[str] = ()
  scaling: Literal["loss", "step"] | None = None


def run(args: Flags) -> int:
  """Compiles what the flags select; returns 1 if the config does not fit."""
  from mtv_jax.perf import topologies

  has_target = args.config and (args.topology or args.scaling)
  if not (has_target or args.table or args.scaling == "loss"):
    raise ConfigError("--config and --topology are needed")
  if args.budget is not None and (args.table or args.scaling):
    raise ConfigError("--budget is read with one --config and --topology only")
  for name in ("step_seconds", "chip_hour"):
    value = getattr(args, name)
    if value is not None and not 0 < value < math.inf:
      raise ConfigError(f"--{name} is {value:g}: expected > 0")
  if not 0 < args.mfu <= 1:
    raise ConfigError(f"--mfu is {args.mfu:g}: expected a fraction such as 0.4")
  topology = topologies.parse(args.topology) if args.topology else None
  # JAX must not start another backend.
  topologies.use_cpu(topology)
  if args.table:
    return _update_table(args.table, args.rows)
  if args.scaling:
    return _compile_scaling(args)
  return _report(args, topology)


def _report(args: Flags, topology: Any) -> int:
  from mtv_jax.perf.preflight import report
  from mtv_jax.perf.preflight import search as search_lib

  config = arguments.read_config(args, topology.canonical_name)
  remat = str((config.get("model") or {}).get("remat", "none")).strip()
  if args.budget is not None and (
    not 0 < args.budget < math.inf or remat != AUTO
  ):
    raise ConfigError(
      f"--budget is {args.budget:g}: expected more than 0 GiB, and "
      f"config.model.remat={AUTO!r}, not {remat!r}"
    )
  result = report.preflight(
    config,
    topology,
    mfu=args.mfu,
    tables="all" if args.tables else "short",
    examples_per_epoch=args.examples,
    norms=args.norms or None,
    budget=args.budget and int(args.budget * 2**30),
    data=args.data,
    step_seconds=args.step_seconds,
    chip_hour=args.chip_hour,
  )
  print(result)
  if args.json:
    atomic.write_text(args.json, result.to_json() + "\n")
  if not result.compiled.fits and args.propose:
    print("\nchanges, compiled:")
    for proposal in search_lib.propose(config, topology):
      print(f"  {proposal}", flush=True)
  elif not result.compiled.fits:
    print("\n--propose compiles changes until one fits.")
  return 0 if result.fits else 1


def _update_table(page: pathlib.Path, words: Sequence[str]) -> int:
  from mtv_jax.perf import topologies
  from mtv_jax.perf.preflight import report

  rows = report.read_table(page.read_text(encoding="utf-8"))
  selected = [row for row in rows if all(w in " ".join(row) for w in words)]
  if not selected:
    configs = ", ".join(dict.fromkeys(config for config, *_ in rows))
    raise ConfigError(
      f"--rows {' '.join(words)}: no row of the table has all of these words; "
      f"its configs are {configs}"
    )
  for config, name, *changes in track(selected, "table", unit="configs"):
    topology = topologies.parse(name)
    recipe = recipes.read_config(config, topology=topology.canonical_name)
    changed = overrides.override(recipe, changes)
    result = report.preflight(changed, topology, norms=False)
    row = report.format_table_row(config, result, *changes)
    text = report.update_table(page.read_text(encoding="utf-8"), row)
    atomic.write_text(page, text)
    print(row, flush=True)
  return 0


def _compile_scaling(args: Flags) -> int:
  from mtv_jax.perf.preflight import scaling

  if args.scaling == "loss":
    compile_fn, subjects = scaling.compile_loss, ("ring", "gathered")
  else:
    compile_fn, subjects = scaling.compile_row, (arguments.read_config(args),)
  jobs = list(itertools.product(subjects, scaling.TOPOLOGIES))
  rows = [compile_fn(*job) for job in track(jobs, "scaling", unit="programs")]
  if args.json:
    atomic.write_text(args.json, json.dumps(scaling.to_dict(rows)) + "\n")
  print(scaling.format_table(rows))
  return 0
