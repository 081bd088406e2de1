"""Arguments that several commands share, each spelled one way."""

import argparse
import functools
import inspect
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mtv_jax.config import overrides, recipes
from mtv_jax.parallel import distributed
from mtv_jax.train.runtime import peers
from mtv_jax.utils.errors import InputError


def add_options(
  parser: argparse.ArgumentParser, options: Mapping[str, tuple[Any, str]]
) -> None:
  """Adds optional flags by name, each with a default or its type, and help."""
  for name, (default, text) in options.items():
    kind = default if isinstance(default, type) else type(default)
    default = None if default is kind else default
    parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def add_set(
  parser: argparse.ArgumentParser, metavar: str, help: str | None = None
) -> None:
  """--set=KEY=VALUE, which may be repeated."""
  parser.add_argument(
    "--set", action="append", default=[], metavar=metavar, help=help
  )


def add_config(
  parser: argparse.ArgumentParser, *, required: bool = True
) -> None:
  """--config, and its overrides as --config.KEY=VALUE or --set=KEY=VALUE."""
  parser.add_argument(
    "--config",
    required=required,
    help="a recipe's file or name, with its arguments after a colon",
  )
  add_set(
    parser, "KEY=VALUE", "override of a config key, as --config.KEY=VALUE"
  )


def read_config(args: argparse.Namespace) -> ConfigDict:
  """The config with its overrides."""
  return overrides.override(recipes.read_config(args.config), args.set)


def add_encoder(parser: argparse.ArgumentParser, **options: Any) -> None:
  """--encoder, --weights and --dtype."""
  parser.add_argument("--encoder", required=True, **options)
  add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
  """--weights and --dtype."""
  add = parser.add_argument
  text = "student, teacher or ema; default: the run's config.weights"
  add("--weights", help=text)
  dtypes = ("float32", "bfloat16")
  add("--dtype", default=dtypes[0], choices=dtypes, help="of the computation")


def add_shards(parser: argparse.ArgumentParser) -> None:
  """--data and --index_dir."""
  add = parser.add_argument
  shards = "the shards: .tar, .array_record or .parquet, ranges and globs"
  add("--data", nargs="+", required=True, help=shards)
  add("--index_dir", help="folder of tar indices (default: beside the tars)")


def add_distributed(parser: argparse.ArgumentParser) -> None:
  """--distributed and what it takes where nothing else tells it."""
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
  text = "exit when not all processes have connected by then (default: 300)"
  seconds = functools.partial(_integer, 1)
  add("--connect_seconds", type=seconds, default=300, help=text)


def initialize_distributed(args: argparse.Namespace) -> None:
  """Joins the other hosts by the flags of `add_distributed`."""
  names = ("distributed", "coordinator", "processes", "process")
  with peers.limit_connecting(args.connect_seconds):
    distributed.initialize(
      **{name: getattr(args, name) for name in names},
      # JAX aborts the process at its own limit.
      seconds=args.connect_seconds + 60,
    )


def add_parameters(
  parser: argparse.ArgumentParser, function: Callable[..., Any]
) -> None:
  """Adds a flag for each parameter of a function.

  Defaults and types are those of the signature, help texts those of the
  docstring. A parameter without a default is required, and an integer is at
  least 1 (0 where that is the default).
  """
  section = inspect.getdoc(function).partition("Args:\n")[2]
  section = section.partition("\n\n")[0]
  helps = dict(
    re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
  )
  for name, parameter in inspect.signature(function).parameters.items():
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    integer = "int" in str(parameter.annotation)
    parser.add_argument(
      f"--{name}",
      required=required,
      default=default,
      type=functools.partial(_integer, int(default != 0)) if integer else str,
      help=" ".join(helps[name].split()).replace("%", "%%"),
    )


def _integer(least: int, text: str) -> int:
  try:
    value = int(text)
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r}: expected an integer of at least {least}"
    ) from None
  if value < least:
    raise argparse.ArgumentTypeError(f"{value}: expected at least {least}")
  return value


def check_writable(folder: str, *parts: str) -> None:
  """Checks that a folder can be written, before the work on its contents.

  Args:
    folder: --output.
    *parts: of the path of a folder in it.

  Raises:
    InputError: it, or a folder above it, is a file or not writable.
  """
  path = pathlib.Path(folder, *parts).absolute()
  existing = next(p for p in (path, *path.parents) if p.exists())
  if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
    return
  why = "is not writable" if existing.is_dir() else "is a file"
  raise InputError(f"--output={folder}: {existing} {why}; name another folder.")
