"""Arguments that several commands share, each spelled one way."""

import argparse

from mtv_jax.parallel import distributed


def positive(text: str) -> int:
  """An argument's type: a whole number of at least 1."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
  return value


def add_config(
  parser: argparse.ArgumentParser, *, required: bool = True
) -> None:
  """--config, and its overrides as --config.KEY=VALUE or --set=KEY=VALUE."""
  parser.add_argument(
    "--config",
    required=required,
    help="a recipe's file or name, with its arguments after a colon",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="override of a config key, the same as --config.KEY=VALUE",
  )


def add_shards(parser: argparse.ArgumentParser) -> None:
  """--data and --index_dir."""
  parser.add_argument(
    "--data",
    nargs="+",
    required=True,
    help="the shards: .tar or .array_record, ranges and globs",
  )
  parser.add_argument(
    "--index_dir", help="of the tars' indices (default: beside the tars)"
  )


def add_distributed(parser: argparse.ArgumentParser) -> None:
  """--distributed, --coordinator, --processes and --process."""
  add = parser.add_argument
  add(
    "--distributed",
    action="store_true",
    help="join the other hosts, each of which runs this command; TPU pods,"
    " SLURM and Open MPI need no more, others the three options below",
  )
  add("--coordinator", help="host:port of process 0; implies --distributed")
  add("--processes", type=int, help="number of processes")
  add("--process", type=int, help="index of this process, from 0")


def initialize_distributed(args: argparse.Namespace) -> None:
  """Joins the hosts as `add_distributed`'s arguments say."""
  distributed.initialize(
    distributed=args.distributed,
    coordinator=args.coordinator,
    processes=args.processes,
    process=args.process,
  )
