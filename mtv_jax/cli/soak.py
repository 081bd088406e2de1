"""Memory, open files and step time of a long run of small steps.

  mtv-jax soak --config=mtv_tiny:tiny --steps=20000 --output=runs/soak

Trains in a process of its own and reads its resident memory and its open files
once a second. Prints by how much a later tenth of the run's time exceeds the
second one, and writes soak.json and charts/*.svg. Linux only.

Exit status: 0 if memory grows by less than 50 MB and open files by none.
"""

import argparse
import functools
import pathlib

from mtv_jax.cli import arguments
from mtv_jax.perf.soak import run_soak


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax soak`."""
  arguments.add_config(parser)
  add = parser.add_argument
  add("--steps", type=int, default=20_000)
  add("--output", required=True, type=pathlib.Path)


def run(args: argparse.Namespace) -> int:
  """Runs the soak; the exit status."""
  flat = run_soak(
    args.config,
    args.output,
    assignments=args.set,
    steps=args.steps,
    log_fn=functools.partial(print, flush=True),
  )
  return int(not flat)
