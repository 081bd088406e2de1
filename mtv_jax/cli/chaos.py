"""Kills a run at random moments, and compares it with an untouched one.

  mtv-jax chaos --config=mtv_tiny:tiny --kills=50 --output=runs/chaos

Trains OUTPUT/untouched, and OUTPUT/killed with SIGKILL at random moments of
starting, restoring, training, saving and evaluating. At the end the whole
train state, metrics.jsonl (but for speeds and goodput) and the evaluations'
files must be equal, bit for bit. With --processes=2 the run has two processes,
of which one is killed; the other one has to exit by itself. OUTPUT may be in a
bucket.

Exit status: 0 if all are equal, else 1.
"""

import argparse
import functools

import jax

from mtv_jax.cli import arguments
from mtv_jax.perf.chaos import run_chaos
from mtv_jax.utils import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax chaos`."""
  arguments.add_config(parser)
  add = parser.add_argument
  add("--output", required=True, help="folder of the runs, or gs://")
  add("--kills", type=int, default=50)
  add("--processes", type=int, default=1)
  add("--seed", type=int, default=0, help="of the moments")


def run(args: argparse.Namespace) -> int:
  """Runs the comparison; the exit status."""
  # The runs need the accelerator, and this process does not.
  jax.config.update("jax_platforms", "cpu")
  equal = run_chaos(
    args.config,
    path.as_path(args.output),
    assignments=args.set,
    kills=args.kills,
    processes=args.processes,
    seed=args.seed,
    log_fn=functools.partial(print, flush=True),
  )
  return int(not equal)
