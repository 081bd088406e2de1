"""Prints a recipe's config, resolved, or what differs from another.

  mtv-jax config mtv_b16_224:tiny --config.batch_size=32

prints every key with its value, as a Python literal: defaults and
derived values are filled in. A run's folder prints its config.json.

  mtv-jax config mtv_l16_256 mtv_b16_224
  mtv-jax config mtv_l16_256 --against=runs/mtv_l16

print only the keys that differ, with both values. Overrides change the first
config. Opens no data, no weights and no tokenizer; the architectures of frozen
teachers, which a run reads from their folders, and the commits of data sets of
the hub are not filled in.
"""

import contextlib
import json as json_lib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mtv_jax.config import overrides, recipes
from mtv_jax.config.options import refuse_imports
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError

_WIDTH = 80  # Characters of a line; long values may exceed it.


def run(
  recipe: Sequence[str] = (),
  /,
  *,
  config: str | None = None,
  against: str | None = None,
  set: list[str] = (),
  json: bool = False,
) -> None:
  """Prints a resolved config, or its differences from another.

  Args:
    recipe: recipe file or name, with its arguments after a colon, or a run's
      folder; a second one prints only what differs.
    config: the first recipe, as other commands take it.
    against: the second recipe or run.
    set: override a key of the first, KEY=VALUE; same as --config.KEY=VALUE.
    json: print JSON; one config prints as in a run's config.json.
  """
  names = [*([config] if config else []), *recipe]
  names += [against] if against else []
  if not 1 <= len(names) <= 2:
    raise InputError(
      f"got {len(names)} configs, expected one, or two to compare: mtv-jax"
      " config RECIPE_OR_RUN [RECIPE_OR_RUN]"
    )
  # Printed before the imports of the model's code, which take seconds.
  sources = [_read(name) for name in names]
  stored = [not isinstance(source, ConfigDict) for source in sources]
  sources[0] = overrides.override(sources[0], set)
  if not json:
    print(f"# {' | '.join(names)}", flush=True)
  configs = [*map(_resolve, sources, stored)]
  print(_to_json(configs) if json else _to_text(configs))


def _read(name: str) -> Any:
  """The config of a recipe, or of a run's folder, not yet checked."""
  if path_lib.is_remote(name) or path_lib.as_path(name).is_dir():
    from mtv_jax.train.workdir import read_recorded_config

    if recorded := read_recorded_config(name):
      return recorded
  return recipes.read_config(name)


def _resolve(config: Any, is_stored: bool) -> dict[str, Any]:
  from mtv_jax.train.run import resolve

  with refuse_imports() if is_stored else contextlib.nullcontext():
    return resolve(config, reads_files=False).to_dict()


def _to_json(configs: Sequence[dict[str, Any]]) -> str:
  if len(configs) == 1:
    return json_lib.dumps(configs[0], indent=2)
  sides = ("config", "against")
  rows = {
    key: {s: v for s, v in pairs if v is not overrides.ABSENT}
    for key, values in overrides.list_differences(configs)
    for pairs in [list(zip(sides, values, strict=True))]
  }
  return json_lib.dumps(rows, indent=2)


def _to_text(configs: Sequence[dict[str, Any]]) -> str:
  if len(configs) == 1:
    rows = [(key, (value,)) for key, value in _list_settings(configs[0])]
  elif not (rows := overrides.list_differences(configs)):
    return "No key differs."
  blocks: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
  for key, values in rows:  # Keys without a section are one block.
    section = key.partition(".")[0].partition("[")[0] if "." in key else ""
    blocks.setdefault(section, []).append((key, values))
  return "\n\n".join(_format_rows(block) for block in blocks.values())


def _format_rows(rows: Sequence[tuple[str, tuple[Any, ...]]]) -> str:
  """Aligned `KEY = VALUE` or `KEY = VALUE | VALUE`; long pairs in two lines."""
  width = max(len(key) for key, _ in rows)
  lines = []
  for key, values in rows:
    line, *more = f"{key:{width}} = ", *map(repr, values[1:])
    line += repr(values[0])
    if len(line) + sum(len(text) + 3 for text in more) <= _WIDTH:
      lines.append(" | ".join([line, *more]))
    else:
      lines += [line, *(f"{'':{width}} | {text}" for text in more)]
  return "\n".join(lines)


def _list_settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  """Keys and values of a config's leaves, in the order of the file."""
  if isinstance(value, Mapping) and value:
    for name, item in value.items():
      yield from _list_settings(item, f"{key}.{name}" if key else str(name))
  elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
    for i, item in enumerate(value):
      yield from _list_settings(item, f"{key}[{i}]")
  else:
    yield key, value
