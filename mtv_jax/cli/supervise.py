"""Restarts a training command until it exits with 0.

  mtv-jax supervise -- mtv-jax train --config=... --workdir=runs/a

After a failure the command starts again, after a pause that doubles with each
failure without progress. Progress is a larger step in WORKDIR/alive; without a
--workdir in the command, a session longer than --min_seconds. It is not started
again after exit code 2 (the command line or the config can't be used), after
--max_failures restarts without progress, and after SIGTERM, SIGINT or SIGHUP to
this process, which are passed on. The exit code is the command's last one.
"""

import argparse

from mtv_jax.train.metrics import setup_logging
from mtv_jax.train.runtime.supervisor import Supervisor
from mtv_jax.utils.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax supervise`."""
  add = parser.add_argument
  add(
    "--max_failures",
    type=int,
    default=5,
    help="restarts in a row without progress",
  )
  add(
    "--backoff",
    type=float,
    default=10.0,
    help="seconds before the first restart",
  )
  add("--max_backoff", type=float, default=600.0, help="seconds at most")
  add(
    "--min_seconds",
    type=float,
    default=600.0,
    help="a session that is progress, of a command without --workdir",
  )
  add("child", nargs="+", metavar="COMMAND", help="the command, after --")


def run(args: argparse.Namespace) -> int:
  """Runs the command until it is done; returns its exit code."""
  numbers = (args.backoff, args.max_backoff, args.max_failures)
  if not all(number >= 0 for number in numbers):  # Nor NaN.
    raise ConfigError(
      "--backoff, --max_backoff and --max_failures must be at least 0."
    )
  setup_logging()
  return Supervisor(
    args.child,
    max_failures=args.max_failures,
    backoff=args.backoff,
    max_backoff=args.max_backoff,
    min_seconds=args.min_seconds,
  ).run()
