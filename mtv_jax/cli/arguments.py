"""Command-line arguments from function signatures."""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from mtv_jax.config import overrides, recipes
from mtv_jax.utils.errors import InputError


def add_parameters(
  parser: argparse.ArgumentParser, function: Callable[..., Any]
) -> None:
  """Adds an argument for each parameter of a function.

  The signature gives name, type, default and choices; the docstring's `Args:`
  gives the help. Parameters without a default are required. Positional-only
  parameters become positional arguments. A bool is a switch, a `Literal` has
  choices, a sequence takes several words, and a list flag may be repeated.
  Integers must be at least 1, at least 0 if the default is 0, or at least N
  with `Annotated[int, N]`. A subclass of `Flags` adds each of its fields.
  """
  helps = _read_helps(function)
  for name, parameter in _parameters(function).items():
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    options, kind, least = {}, parameter.annotation, [int(default != 0)]
    if _is_flags(kind):
      add_parameters(parser, kind)
      continue
    if typing.get_origin(kind) is Annotated:
      kind, *least = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
      kind, *_ = typing.get_args(kind)  # `T` of `T | None`.
    if kind is bool:
      options["action"] = "store_true"
    elif typing.get_origin(kind) is Literal:
      options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) in (Sequence, list):
      if typing.get_origin(kind) is list:
        options["action"] = "append"
      else:
        # An optional positional argument may be left out.
        optional = parameter.kind is parameter.POSITIONAL_ONLY and not required
        options["nargs"] = "*" if optional else "+"
      default = None if required else list(default)
      (kind,) = typing.get_args(kind)
    if kind is int:
      options["type"] = functools.partial(_integer, least[0])
    elif kind in (float, pathlib.Path):
      options["type"] = kind
    flag = name
    if parameter.kind is not parameter.POSITIONAL_ONLY:
      flag, options["required"] = f"--{name}", required
    text = " ".join(helps[name].split()).replace("%", "%%")
    parser.add_argument(flag, default=default, help=text, **options)


def call(function: Callable[..., Any], args: argparse.Namespace) -> Any:
  """Calls a function with the arguments that `add_parameters` defined."""
  positional, named = [], {}
  for name, parameter in _parameters(function).items():
    if _is_flags(parameter.annotation):
      named[name] = call(parameter.annotation, args)
    elif parameter.kind is parameter.POSITIONAL_ONLY:
      positional.append(getattr(args, name))
    else:
      named[name] = getattr(args, name)
  return function(*positional, **named)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Flags:
  """Base class of frozen dataclasses whose fields are command-line flags."""

  def __init_subclass__(cls) -> None:
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _is_flags(annotation: Any) -> bool:
  return isinstance(annotation, type) and issubclass(annotation, Flags)


def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
  return inspect.signature(function, eval_str=True).parameters


def _read_helps(function: Callable[..., Any]) -> dict[str, str]:
  """Parses `Args:` into help texts by name; classes inherit theirs."""
  helps = {}
  for documented in getattr(function, "__mro__", [function]):
    section = inspect.cleandoc(documented.__doc__ or "").partition("Args:\n")[2]
    section = section.partition("\n\n")[0]
    pattern = r"^  (\w+): (.*(?:\n    .*)*)"
    helps = dict(re.findall(pattern, section, re.MULTILINE)) | helps
  return helps


def _integer(least: int, text: str) -> int:
  with contextlib.suppress(ValueError):
    if (value := int(text)) >= least:
      return value
  raise argparse.ArgumentTypeError(
    f"{text!r}: expected an integer of at least {least}"
  )


class ConfigFlags(Flags):
  """A recipe and its overrides, --config.KEY=VALUE or --set=KEY=VALUE.

  Args:
    config: recipe file or name, with its arguments after a colon.
    set: override a config key, KEY=VALUE; same effect as --config.KEY=VALUE.
  """

  config: str
  set: list[str] = ()


def read_config(args: ConfigFlags, topology: str = "") -> ConfigDict:
  """Reads the config for a topology and applies the overrides."""
  config = recipes.read_config(args.config, topology=topology)
  return overrides.override(config, args.set)


class WeightFlags(Flags):
  """Which weights of a model to load, and the computation dtype.

  Args:
    weights: student, teacher or ema; default: the run's config.weights.
    dtype: computation dtype.
  """

  weights: str | None = None
  dtype: Literal["float32", "bfloat16"] = "float32"


class ShardFlags(Flags):
  """Image shards.

  Args:
    data: .tar, .array_record or .parquet shards; ranges and globs are allowed.
    index_dir: folder of tar indices (default: beside the tars).
  """

  data: Sequence[str]
  index_dir: str | None = None


class DistributedFlags(Flags):
  """Multi-host initialization.

  Args:
    distributed: run on several hosts, with this command on each; outside TPU
      pods, SLURM and Open MPI also set the next three options.
    coordinator: host:port of process 0; implies --distributed.
    processes: number of processes.
    process: index of this process, from 0.
    connect_seconds: exit if not all processes connect within this time
      (default: 300).
  """

  distributed: bool = False
  coordinator: str | None = None
  processes: int | None = None
  process: Annotated[int | None, 0] = None
  connect_seconds: int = 300


def initialize_distributed(args: DistributedFlags) -> None:
  """Initializes JAX for several hosts."""
  names = ("distributed", "coordinator", "processes", "process")
  # They import JAX, which takes seconds, and most commands don't need it.
  from mtv_jax.parallel import distributed
  from mtv_jax.train.runtime import peers

  with peers.limit_connecting(args.connect_seconds):
    distributed.initialize(
      **{name: getattr(args, name) for name in names},
      # JAX aborts the process when its own limit expires.
      seconds=args.connect_seconds + 60,
    )


def check_writable(folder: str, *parts: str, flag: str = "output") -> None:
  """Checks early that a subfolder of --output, or of a flag, can be written."""
  if "\0" in folder:
    raise InputError(f"--{flag}={folder!r} has the character NUL.")
  path = pathlib.Path(folder, *parts).absolute()
  existing = next(p for p in (path, *path.parents) if p.exists())
  if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
    return
  why = "is not writable" if existing.is_dir() else "is a file"
  raise InputError(f"--{flag}={folder}: {existing} {why}; name another folder.")
