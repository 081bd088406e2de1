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

  The signature defines name, type, default and choices; the docstring's `Args:`
  defines the help. Parameters without a default are required. Positional-only
  parameters become positional arguments. A bool is a switch, a `Literal` has
  choices, a sequence takes several values, and a list flag may be repeated.
  Integers must be at least 1, at least 0 if the default is 0, or at least N
  with `Annotated[int, N]`. A subclass of `Flags` adds each of its fields.
  """
  help_texts = _read_help_texts(function)
  for name, parameter in _read_parameters(function).items():
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    options, annotation, minimum = {}, parameter.annotation, [int(default != 0)]
    if _is_flags(annotation):
      add_parameters(parser, annotation)
      continue
    if typing.get_origin(annotation) is Annotated:
      annotation, *minimum = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
      annotation, *_ = typing.get_args(annotation)  # `T` of `T | None`.
    if annotation is bool:
      options["action"] = "store_true"
    elif typing.get_origin(annotation) is Literal:
      options["choices"] = typing.get_args(annotation)
    elif typing.get_origin(annotation) in (Sequence, list):
      if typing.get_origin(annotation) is list:
        options["action"] = "append"
      else:
        # An optional positional argument may be left out.
        optional = parameter.kind is parameter.POSITIONAL_ONLY and not required
        options["nargs"] = "*" if optional else "+"
      default = None if required else list(default)
      (annotation,) = typing.get_args(annotation)
    if annotation is int:
      options["type"] = functools.partial(_parse_integer, minimum[0])
    elif annotation in (float, pathlib.Path):
      options["type"] = annotation
    flag = name
    if parameter.kind is not parameter.POSITIONAL_ONLY:
      flag, options["required"] = f"--{name}", required
    text = " ".join(help_texts[name].split()).replace("%", "%%")
    parser.add_argument(flag, default=default, help=text, **options)


def call(function: Callable[..., Any], args: argparse.Namespace) -> Any:
  """Calls a function with the arguments that `add_parameters` defined."""
  positional, keywords = [], {}
  for name, parameter in _read_parameters(function).items():
    if _is_flags(parameter.annotation):
      keywords[name] = call(parameter.annotation, args)
    elif parameter.kind is parameter.POSITIONAL_ONLY:
      positional.append(getattr(args, name))
    else:
      keywords[name] = getattr(args, name)
  return function(*positional, **keywords)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Flags:
  """Base class of frozen dataclasses whose fields are command-line flags."""

  def __init_subclass__(cls) -> None:
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _is_flags(annotation: Any) -> bool:
  return isinstance(annotation, type) and issubclass(annotation, Flags)


def _read_parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
  return inspect.signature(function, eval_str=True).parameters


def _read_help_texts(function: Callable[..., Any]) -> dict[str, str]:
  """Parses `Args:` into help texts by name; a class inherits its bases'."""
  help_texts = {}
  for item in getattr(function, "__mro__", [function]):
    section = inspect.cleandoc(item.__doc__ or "").partition("Args:\n")[2]
    section = section.partition("\n\n")[0]
    pattern = r"^  (\w+): (.*(?:\n    .*)*)"
    help_texts = dict(re.findall(pattern, section, re.MULTILINE)) | help_texts
  return help_texts


def _parse_integer(minimum: int, text: str) -> int:
  with contextlib.suppress(ValueError):
    if (value := int(text)) >= minimum:
      return value
  raise argparse.ArgumentTypeError(
    f"{text!r}: expected an integer of at least {minimum}"
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
  # These import JAX, which takes seconds and which few commands need.
  from mtv_jax.parallel import distributed
  from mtv_jax.train.runtime import peers

  with peers.limit_connecting(args.connect_seconds):
    distributed.initialize(
      **{name: getattr(args, name) for name in names},
      # JAX aborts the process when its own limit expires.
      seconds=args.connect_seconds + 60,
    )


def check_writable(folder: str, *parts: str, flag: str = "output") -> None:
  """Checks early that the folder of --output, or another flag, is writable."""
  if "\0" in folder:
    raise InputError(f"--{flag}={folder!r} contains the character NUL.")
  path = pathlib.Path(folder, *parts).absolute()
  existing = next(p for p in (path, *path.parents) if p.exists())
  if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
    return
  why = "is not writable" if existing.is_dir() else "is a file"
  raise InputError(f"--{flag}={folder}: {existing} {why}; name another folder.")
