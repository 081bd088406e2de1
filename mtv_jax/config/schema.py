"""The config schema, durations, and recipes with typed arguments.

Nothing here imports JAX, as data workers and command lines need it.
"""

import ast
import dataclasses
import math
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from mtv_jax.utils.errors import ConfigError, did_you_mean

UNITS = ("steps", "epochs", "examples", "percent")
REQUIRED = object()
Config = ConfigDict | Mapping[str, Any]

# ---------------------------------------------------------------------------
# The schema.

# Kinds of keys: a plain value is the default and gives the type, a type is a
# required key, a dictionary is a section.


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some strings; the first is the default."""

  options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Maybe:
  """An optional value of a kind; None gives the default."""

  kind: Any
  default: Any = None


@dataclasses.dataclass(frozen=True)
class Duration:
  """One of NAME_steps, NAME_epochs, NAME_examples and NAME_percent.

  `default` is in steps; `int` makes the duration required.
  """

  default: int | type | None
  units: tuple[str, ...] = UNITS
  zero: Literal["allowed", "refused"] = "allowed"


@dataclasses.dataclass(frozen=True)
class Entries:
  """Named sections: {NAME: section}.

  Checks these keys; others are options that `config.options` checks when the
  entry is built. `type` defaults to the entry's name.
  """

  keys: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Open:
  """A section with further options, which `config.options` checks."""

  keys: Mapping[str, Any]


SCHEMA = {
  "seed": 0,
  "batch_size": int,  # Examples a step, over all hosts.
  "total": Duration(int, UNITS[:3], zero="refused"),
  "data": {
    # Sources: dict(type, weight=1.0, and what the source takes).
    "train": list,
    "ops": str,  # Host ops: "decode|canvas(224)|caption(64)".
    "workers": 0,  # Reader processes; 0 reads by threads of this process.
    "threads": Maybe(int),
    "prefetch": Maybe(int),
    "max_corrupt": 0.01,  # Share of unusable records that stops the run.
    "shuffle": Choice(("global", "block", "none")),
  },
  "views": Entries({"count": 1, "ops": (str, list)}),
  "model": Open(
    {
      "variant": "B/16",
      "image_size": 224,  # What the position embedding is stored for.
      "pool": Choice(("map", "cls", "mean")),
      "dtype": Choice(("bfloat16", "float32")),
      "remat": "none",
      "scan": True,
      "text": Maybe(
        Open(
          {
            "variant": "B",
            "length": 64,
            "vocab_size": 32_000,
            "tokenizer": "bytes",  # Or a path: *.model, *.json.
            "clean": Choice(("lower", "none", "canonicalize")),
          }
        )
      ),
    }
  ),
  "accumulate": 1,  # Parts a batch is encoded in, one after the other.
  # A weight is a number, or dict(value, start_*, ramp_*): durations.
  "objectives": Entries(
    {"type": str, "weight": Maybe((float, int, dict), 1.0)}
  ),
  # With the options of the optimizer, see `train/optim.py`.
  "optim": Open(
    {
      "name": "adamw",
      "lr": float,
      "weight_decay": 0.0,  # Times the learning rate, as optax has it.
      "eps": 1e-8,
      "mu_dtype": Choice(("float32", "bfloat16")),
      "clip_norm": 1.0,  # Of the gradients' global norm; 0 for no clipping.
      "rules": (),  # (regex, dict(lr=multiplier, weight_decay=multiplier)).
    }
  ),
  # With the options of the schedule, see `train/schedules.py`.
  "schedule": Open(
    {
      "name": "cosine",
      "warmup": Duration(0),
      "cooldown": Duration(0),
      "timescale": Duration(10_000),  # Of rsqrt.
      "end": 0.0,  # Of cosine, as a share of optim.lr.
    }
  ),
  "ema": Maybe({"decay": 0.9999}),
  # Constant as in SILC, where a rising momentum hurts the text tower; `end`
  # gives DINOv2's cosine.
  "teacher": {"momentum": 0.996, "end": Maybe(float)},
  # dcn: how many parts of an axis lie on different slices, see make_mesh.
  "mesh": {
    "data": -1,
    "fsdp": 1,
    "tensor": 1,
    "dcn": {"data": -1, "fsdp": 1, "tensor": 1},
  },
  "sharding": (),  # (regex, axis or axes of each trailing dimension).
  "init": Maybe(
    {
      "path": str,
      "step": Maybe(int),
      "weights": Choice(("student", "teacher", "ema")),
      "include": Maybe((list, tuple)),
      "rename": (),
      "min_coverage": 0.99,
    }
  ),
  "evals": Entries({"type": str, "every": Duration(None)}),
  "checkpoint": {
    "every": Duration(1000, zero="refused"),
    "keep": 2,
    "keep_every": Maybe(int),
  },
  # gradients: how often each objective's gradient norm is measured.
  "log": {
    "every": Duration(50, zero="refused"),
    "gradients": Duration(None),
  },
}


# Ranges of numbers: (key, min, max).
_RANGES = (
  ("seed", 0, 2**32 - 1),  # JAX's keys would drop higher bits.
  ("batch_size", 1, math.inf),
  ("accumulate", 1, math.inf),
  ("data.max_corrupt", 0, 1),
  ("optim.lr", 0, math.inf),
  ("optim.weight_decay", 0, math.inf),
  ("optim.clip_norm", 0, math.inf),
  ("schedule.end", 0, 1),
  ("ema.decay", 0, 1),
  ("teacher.momentum", 0, 1),
  ("teacher.end", 0, 1),
  ("init.min_coverage", 0, 1),
  ("checkpoint.keep", 1, math.inf),
  ("checkpoint.keep_every", 0, math.inf),
)


# ---------------------------------------------------------------------------
# Checking.


def check_config(config: Config) -> ConfigDict:
  """Checks a config and fills in the defaults.

  Args:
    config: what a config file's `get_config` returns.

  Returns:
    A new config with every key of `SCHEMA`; checking it again changes nothing.

  Raises:
    ConfigError: an unknown or missing key, or a value of another type; names
      the full key.
  """
  resolved = _section("config", SCHEMA, _plain(config))
  for path, least, most in _RANGES:
    _require_between(path, least, most, resolved)
  for name, entry in resolved["objectives"].items():
    if not isinstance(entry["weight"], Mapping):
      path = f"objectives.{name}.weight"
      _require_between(path, 0, math.inf, resolved)
  for i, source in enumerate(resolved["data"]["train"]):
    if not isinstance(source, Mapping) or "type" not in source:
      raise ConfigError(
        f"config.data.train[{i}] is {source!r}, expected a dictionary with a"
        " type."
      )
  if not resolved["data"]["train"]:
    raise ConfigError("config.data.train is empty: no data to train on.")
  return ConfigDict(resolved)


def _require_between(
  path: str, least: int, most: float | int, config: Mapping[str, Any]
) -> None:
  """Raises ConfigError for a number at `path` that is out of range."""
  value = config
  for key in path.split("."):
    value = None if value is None else value.get(key)
  if value is None or (least <= value <= most and math.isfinite(value)):
    return
  bounds = f"from {least} to {most}" if math.isfinite(most) else f">= {least}"
  raise ConfigError(f"config.{path} is {value}, expected {bounds}.")


def _plain(value: Any) -> Any:
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {key: _plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(_plain(v) for v in value)
  return value


def _section(
  path: str, schema: Mapping[str, Any], given: Any, *, extra: str = "refuse"
) -> dict[str, Any]:
  if not isinstance(given, Mapping):
    raise ConfigError(f"{path} is {given!r}, expected a section (a dict).")
  keys = {}
  for name, kind in schema.items():
    if isinstance(kind, Duration):
      keys |= {f"{name}_{unit}": name for unit in kind.units}
    else:
      keys[name] = name
  if extra == "refuse":
    for key in given:
      if key not in keys:
        raise ConfigError(
          f"{path}.{key} is an unknown key. {did_you_mean(key, keys)}"
        )
  out = {}
  for name, kind in schema.items():
    if isinstance(kind, Duration):
      out |= _duration(path, name, kind, given)
    else:
      out[name] = _value(f"{path}.{name}", kind, given.get(name))
  return {k: v for k, v in given.items() if k not in keys} | out


def _duration(
  path: str, name: str, kind: Duration, given: Mapping[str, Any]
) -> dict[str, Any]:
  keys = [f"{name}_{unit}" for unit in kind.units]
  values = {k: given[k] for k in keys if given.get(k) is not None}
  if len(values) > 1 or (not values and kind.default is int):
    got = ", ".join(f"{k}={v}" for k, v in values.items()) or "none"
    raise ConfigError(
      f"{path}: give exactly one of {', '.join(keys)}; got {got}."
    )
  for key, value in values.items():
    value = _value(f"{path}.{key}", float, value)
    if not (value > 0 or (value == 0 and kind.zero == "allowed")):
      at_least = ">= 0" if kind.zero == "allowed" else "> 0"
      raise ConfigError(f"{path}.{key} is {value:g}, expected {at_least}.")
  if not values and kind.default is not None:
    values = {f"{name}_steps": kind.default}
  return values


def _value(path: str, kind: Any, value: Any) -> Any:
  """The checked value of a key; None counts as absent."""
  if isinstance(kind, Maybe):
    return kind.default if value is None else _value(path, kind.kind, value)
  if isinstance(kind, Mapping):
    return _section(path, kind, value or {})
  if isinstance(kind, Open):
    return _section(path, kind.keys, value or {}, extra="keep")
  if isinstance(kind, Entries):
    return _entries(path, kind.keys, value or {})
  if isinstance(kind, Choice):
    value = kind.options[0] if value is None else value
    if value not in kind.options:
      raise ConfigError(
        f"{path} is {value!r}. {did_you_mean(str(value), kind.options)}"
      )
    return value
  if isinstance(kind, type) or (kind and isinstance(kind, tuple)):
    if value is None:
      raise ConfigError(f"{path} is missing; it has no default.")
    return _typed(path, kind, value)
  return kind if value is None else _typed(path, type(kind), value)


def _entries(path: str, keys: Mapping[str, Any], given: Any) -> dict[str, Any]:
  if not isinstance(given, Mapping):
    raise ConfigError(f"{path} is {given!r}, expected named entries (a dict).")
  out = {}
  for name, entry in given.items():
    # None removes an entry, for example on the command line.
    if entry is None:
      continue
    if "type" in keys and isinstance(entry, Mapping):
      entry = {"type": name} | entry
    out[name] = _section(f"{path}.{name}", keys, entry, extra="keep")
  return out


def _typed(path: str, kind: type | tuple[type, ...], value: Any) -> Any:
  kinds = kind if isinstance(kind, tuple) else (kind,)
  # JSON has only lists, 1 is a valid float, and True is not a number.
  wanted = {
    float: (float, int),
    tuple: (tuple, list),
    list: (list, tuple),
  }
  allowed = tuple(t for k in kinds for t in wanted.get(k, (k,)))
  odd = isinstance(value, bool) and bool not in kinds
  if odd or not isinstance(value, allowed):
    names = " or ".join(k.__name__ for k in kinds)
    raise ConfigError(
      f"{path} is {value!r} ({type(value).__name__}), expected {names}."
    )
  return float(value) if kinds == (float,) else value


# ---------------------------------------------------------------------------
# Durations: NAME_steps | NAME_epochs | NAME_examples | NAME_percent.


def steps(
  name: str,
  config: Config,
  *,
  batch_size: int,
  examples_per_epoch: int | None = None,
  total_steps: int | None = None,
  default: Any = REQUIRED,
) -> Any:
  """The duration `name` of a section, in steps.

  Args:
    name: 'warmup' reads warmup_steps, warmup_epochs, warmup_examples or
      warmup_percent (of `total_steps`); a key whose value is None counts as
      absent.
    config: the section.
    batch_size: examples a step, over all hosts.
    examples_per_epoch: None for data without an end.
    total_steps: of the run.
    default: returned if no key is given.

  Returns:
    The nearest number of steps, at least 1 unless the duration is 0.

  Raises:
    ConfigError: no key or several are given, or one that can't be converted.
  """
  given = {u: config.get(f"{name}_{u}") for u in UNITS}
  given = {unit: value for unit, value in given.items() if value is not None}
  if not given and default is not REQUIRED:
    return default
  if len(given) != 1:
    keys = ", ".join(f"{name}_{unit}" for unit in UNITS)
    got = ", ".join(f"{name}_{u}={v}" for u, v in given.items()) or "none"
    raise ConfigError(f"give exactly one of {keys}; got {got}.")
  (unit, value), key = *given.items(), f"{name}_{next(iter(given))}"
  if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
    raise ConfigError(f"{key} is {value!r}, expected a number, at least 0.")
  if unit == "steps":
    if value != int(value):
      raise ConfigError(f"{key} is {value!r}, expected a whole number.")
    return int(value)
  if unit == "percent":
    if total_steps is None:
      raise ConfigError(f"{key} needs a run of known length. Use another unit.")
    count = value / 100 * total_steps
  elif unit == "examples":
    count = value / batch_size
  else:
    if examples_per_epoch is None:
      raise ConfigError(
        f"{key}: this data has no known length; use {name}_steps or"
        f" {name}_examples."
      )
    count = value * examples_per_epoch / batch_size
  return max(round(count), 1) if value else 0


def total_steps(config: Config, examples_per_epoch: int | None) -> int:
  """The length of the run, from total_steps, total_epochs or total_examples."""
  return steps(
    "total",
    config,
    batch_size=config["batch_size"],
    examples_per_epoch=examples_per_epoch,
  )


# ---------------------------------------------------------------------------
# Typed arguments of a config file: "tiny,batch=64".


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses what follows the colon in `--config=file.py:tiny,batch=64`.

  Args:
    arg: 'name=value' pairs with commas; a bare name sets a bool to True.
    **defaults: all arguments; the default gives the type. With None any
      literal or string is accepted.

  Raises:
    ConfigError: an unknown name, or a value of the wrong type.
  """
  out = dict(defaults)
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    name, equals, text = part.partition("=")
    if name not in defaults:
      raise ConfigError(
        f"this config has no argument {name!r}. {did_you_mean(name, defaults)}"
      )
    default = defaults[name]
    if not equals and not isinstance(default, bool):
      raise ConfigError(f"argument {name!r} needs a value: {name}=...")
    out[name] = _parsed(name, text, default) if equals else True
  return ConfigDict(out)


def _parsed(name: str, text: str, default: Any) -> Any:
  if isinstance(default, str):
    return text
  if isinstance(default, bool):
    text = text.capitalize()
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(default, float) and type(value) is int:
    value = float(value)
  if default is not None and type(value) is not type(default):
    raise ConfigError(
      f"argument {name}={text!r}: expected {type(default).__name__}, such as"
      f" {name}={default!r}."
    )
  return value


def read_config(path: str, **arguments: Any) -> ConfigDict:
  """The config of a recipe.

  Args:
    path: a file or a packaged recipe, each with its arguments after a colon:
      `FOLDER/NAME.py`, `NAME`, `NAME:tiny,batch=64`.
    **arguments: further arguments, typed; those of a recipe that varies
      another one.

  Raises:
    ConfigError: no such recipe, or a file without a `get_config`.
  """
  name, _, arg = path.partition(":")
  file = name if os.path.isfile(name) else _packaged_recipe(name)
  values = runpy.run_path(file)
  if "get_config" not in values:
    raise ConfigError(f"{file} defines no get_config(arg).")
  given = [arg, *(f"{key}={value}" for key, value in arguments.items())]
  return values["get_config"](",".join(filter(None, given)) or None)


def _packaged_recipe(name: str) -> str:
  """The file of a recipe of `mtv_jax.configs`."""
  folder = pathlib.Path(__file__).parents[1] / "configs"
  recipes = sorted(file.stem for file in folder.glob("[!_]*.py"))
  if name not in recipes:
    raise ConfigError(
      f"there is no config {name!r}. {did_you_mean(name, recipes)}"
    )
  return str(folder / f"{name}.py")
