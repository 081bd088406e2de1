"""Recipes: config files whose `get_config` takes typed arguments."""

import contextlib
import pathlib
import runpy
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mtv_jax import configs
from mtv_jax.config import data_arguments, overrides
from mtv_jax.utils.errors import (
  ConfigError,
  UserError,
  did_you_mean,
  printable,
)
from mtv_jax.utils.path_patterns import split_paths

# The data arguments of the recipe being read; None outside `read_config`.
_data_args: dict[str, str] | None = None


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses the arguments after the colon in `--config=file.py:tiny,batch=64`.

  A bare name sets a bool to True. The defaults set the types; None allows any
  literal or string. `read_config` takes the `data_arguments` that `defaults`
  lacks. Raises ConfigError for an unknown name or a wrong type.
  """
  out, data_args = dict(defaults), _data_args
  data_names = () if data_args is None else data_arguments.ARGUMENTS
  for part in split_paths(arg or ""):  # Not at commas within braces.
    name, equals, text = part.partition("=")
    if name in data_names and name not in defaults:
      if not text:
        raise ConfigError(f"argument {name!r} needs a value: {name}=PATH")
      if data_args.get(name, text) != text:
        raise ConfigError(f"argument {name!r} is passed twice.")
      data_args[name] = text
      continue
    if name not in defaults:
      hint = did_you_mean(name, [*defaults, *data_names])
      if data_args and not equals:
        hint += (
          " A path with a comma can't be an argument: rename it or use a"
          " symlink."
        )
      raise ConfigError(f"this config has no argument {name!r}. {hint}")
    default = defaults[name]
    if not equals and not isinstance(default, bool):
      raise ConfigError(f"argument {name!r} needs a value: {name}=...")
    key = f"argument {name}"
    out[name] = overrides.parse_value(text, default, key) if equals else True
    if isinstance(default, tuple) and not isinstance(out[name], list | tuple):
      raise ConfigError(f"{key}={text!r}; expected a list")
  return ConfigDict(out)


def read_config(
  path: str, *, topology: str = "", **arguments: Any
) -> ConfigDict:
  """Reads the config of a recipe, with its `read_settings` for a topology.

  The path is a file or a packaged recipe, with arguments after a colon, such as
  `FOLDER/NAME.py` or `NAME:tiny,batch=64`; every recipe takes the arguments of
  `data_arguments`. Raises ConfigError if the recipe does not exist or lacks
  `get_config`.
  """
  name, _, arg = path.partition(":")
  values = _run_file(name)
  pairs = [arg, *(f"{key}={value}" for key, value in arguments.items())]
  arg = ",".join(filter(None, pairs)) or None
  global _data_args
  if _data_args is not None:  # A recipe reads another one.
    return values["get_config"](arg)
  _data_args = {}
  try:
    with _locate_errors(name, values["__file__"]):
      config = values["get_config"](arg)
    if not isinstance(config, ConfigDict):
      kind = type(config).__name__
      raise ConfigError(f"{name}: get_config returned {kind}, not ConfigDict.")
    config = data_arguments.apply_data_arguments(config, _data_args)
  finally:
    _data_args = None
  settings = read_settings(f"{name}:{arg or ''}", topology)
  return overrides.override(config, settings) if settings else config


def read_settings(path: str, topology: str) -> Sequence[str]:
  """Overrides of a recipe for a topology, from its constant `TOPOLOGIES`.

  They apply to the unmodified recipe: empty if `path` has arguments other than
  the tokenizer and `data_arguments`. Recipes that read it define their own.
  """
  name, _, arg = path.partition(":")
  names = {part.partition("=")[0].strip() for part in split_paths(arg)}
  if not topology or names - {"", "tokenizer", *data_arguments.ARGUMENTS}:
    return ()
  return _run_file(name).get("TOPOLOGIES", {}).get(topology, ())


@contextlib.contextmanager
def _locate_errors(name: str, file: str) -> Iterator[None]:
  """Turns an exception of a recipe into a ConfigError with file and line."""
  try:
    yield
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    # A SyntaxError's message contains the line.
    where = f"{name}, line {lines[-1]}" if lines else name
    text = f"{where}: {type(error).__name__}: {printable(error)}"
    raise ConfigError(text) from error


def _run_file(name: str) -> dict[str, Any]:
  """Returns the globals of a recipe's file; does not call `get_config`."""
  file = pathlib.Path(name)
  if not file.is_file():
    folder = pathlib.Path(configs.__path__[0])
    recipes = sorted(file.stem for file in folder.glob("[!_]*.py"))
    # Outside a checkout, a file of `configs/` also names the packaged recipe.
    recipe = name.removeprefix("configs/").removesuffix(".py")
    if recipe not in recipes:
      # Files beside a misspelled one, with its folder as the user wrote it.
      files = file.parent.glob("*.py") if file.suffix == ".py" else ()
      siblings = [str(path) for path in files if path.stem not in recipes]
      hint = did_you_mean(name, [*recipes, *siblings])
      start, _, rest = name.partition(",")
      if start.removeprefix("configs/").removesuffix(".py") in recipes:
        hint = f"Arguments follow a colon: --config={start}:{rest}"
      raise ConfigError(f"there is no config {name!r}. {hint}")
    file = folder / f"{recipe}.py"
  if file.suffix != ".py":
    raise ConfigError(
      f"{file} is not a recipe (a Python file). For a run's config, pass the"
      " run's folder to `mtv-jax config`."
    )
  with _locate_errors(name, str(file)):
    values = runpy.run_path(str(file))
  if "get_config" not in values:
    raise ConfigError(f"{file} defines no get_config(arg).")
  return values
