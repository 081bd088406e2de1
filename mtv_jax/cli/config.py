"""Prints a recipe's resolved config, or its differences from another.

  mtv-jax config mtv_b16_224:tiny --config.batch_size=32

prints every key with its value, as a Python literal: defaults and
derived values are filled in. A run's folder prints its config.json.

  mtv-jax config mtv_l16_256 --against=mtv_b16_224
  mtv-jax config mtv_l16_256 --against=runs/mtv_l16

print only the keys that differ, as KEY: VALUE -> OTHER'S VALUE. Overrides
change the first config. Opens neither data, weights nor tokenizer. What a run
reads from these is not filled in: the size of a tokenizer's vocabulary (None),
architectures of frozen teachers, and commits of hub data sets.
"""

import contextlib
import json as json_lib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mtv_jax.config import overrides, recipes
from mtv_jax.config.options import refuse_imports
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError


def run(
  recipe: str,
  /,
  *,
  against: str | None = None,
  topology: str = "",
  set: list[str] = (),
  json: bool = False,
) -> None:
  """Prints a resolved config, or its differences from another.

  Args:
    recipe: recipe file or name, with its arguments after a colon, or a run's
      folder or config.json.
    against: another recipe or run; prints only what differs from it.
    topology: apply the recipe's settings for it, such as v5e:16x16.
    set: override a key of the first config, KEY=VALUE; as --config.KEY=VALUE.
    json: print JSON; one config prints as in a run's config.json.
  """
  # Read before the imports of the model's code, which take seconds.
  config, is_stored = _read(recipe, topology)
  config = overrides.override(config, set)
  other = None if against is None else _read(against, topology)
  if not json:
    print(f"# {recipe}{'' if other is None else f' -> {against}'}", flush=True)
  config = _resolve(recipe, config, is_stored)
  if other is None:
    rows = [f"{key} = {value!r}" for key, value in _list_settings(config)]
  else:
    configs = config, _resolve(against, *other)
    config = dict(overrides.list_differences(configs))
    rows = overrides.describe_difference(*configs) or ["No key differs."]
  print(
    json_lib.dumps(config, indent=2, default=repr) if json else "\n".join(rows)
  )


def _read(name: str, topology: str) -> tuple[Any, bool]:
  """Returns the unchecked config, and whether a run stored it."""
  path = path_lib.as_path(name)
  path = path if path.name == "config.json" else path / "config.json"
  if not path_lib.is_file(path):
    return recipes.read_config(name, topology=topology), False
  from mtv_jax.train.workdir import read_recorded_config

  if not (recorded := read_recorded_config(path.parent)):
    raise InputError(
      f"{path} is damaged: it is not JSON. Pass the run's recipe; training with"
      " it again writes the file."
    )
  return recorded, True


def _resolve(name: str, config: Any, is_stored: bool) -> dict[str, Any]:
  from mtv_jax.hooks.evaluation import build_evaluators
  from mtv_jax.train.config import resolve

  with refuse_imports() if is_stored else contextlib.nullcontext():
    resolved = resolve(config, reads_files=False)
    build_evaluators(resolved.evals)  # Raises for unknown options.
  if resolved.parts is None:
    print(
      f"config: {name} has teachers in folders, which are not read: values that"
      " depend on them, such as the mask token, are not filled in.",
      file=sys.stderr,
    )
  return resolved.to_dict()


def _list_settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  """Yields keys and values of a config's leaves, in the order of the file."""
  if isinstance(value, Mapping) and value:
    for name, item in value.items():
      yield from _list_settings(item, f"{key}.{name}" if key else str(name))
  elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
    for i, item in enumerate(value):
      yield from _list_settings(item, f"{key}[{i}]")
  else:
    yield key, value
