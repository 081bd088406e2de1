"""Config overrides, --config.KEY=VALUE, and differences between configs.

Overrides may set keys that the config file omits; `train.run.resolve` rejects
unknown keys.
"""

import ast
import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mtv_jax.config import sections
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  did_you_mean,
  printable,
)
from mtv_jax.utils.text import truncate

_MAX_CHARS = 120  # Characters of a value in a line of `describe_difference`.
_PART = r"[A-Za-z_][\w-]*(\[\d+\])*"
_KEY = re.compile(rf"{_PART}(\.{_PART})*")


def from_flags(argv: Iterable[str]) -> list[str]:
  """Rewrites --config.KEY=VALUE and --config.KEY VALUE as --set=KEY=VALUE."""
  rewritten, remaining = [], list(argv)
  while remaining:
    arg = remaining.pop(0)
    if match := re.match(r"--?config\.(.*)", arg, re.DOTALL):
      assignment = match[1]
      if "=" not in assignment:
        if not remaining or remaining[0].startswith("--"):
          raise ConfigError(f"{arg} has no value: write {arg}=VALUE.")
        assignment = f"{assignment}={remaining.pop(0)}"
      arg = f"--set={assignment}"
    rewritten.append(arg)
  return rewritten


def override(config: Any, assignments: Iterable[str]) -> ConfigDict:
  """Copies a config, resolved or not, and applies assignments in order.

  Assignments are 'KEY=VALUE'. A key is a path such as 'optim.lr' or
  'data.train[0].path'; for values see `parse_value`. 'None' sets a key to None;
  so does 'none', unless the key accepts that string.
  """
  tree = sections.to_dict(config)
  for assignment in assignments:
    key, _, text = assignment.partition("=")
    shown_assignment = printable(assignment, _MAX_CHARS)
    if not _KEY.fullmatch(key):
      raise ConfigError(
        f"--config.{shown_assignment}: {printable(key, _MAX_CHARS)!r} is not a"
        " key. Keys are written --config.optim.lr=1e-3 or"
        " --config.data.train[0].path=..."
      )
    try:
      assignment.encode()
    except UnicodeEncodeError:
      raise ConfigError(
        f"--config.{shown_assignment}: not valid UTF-8."
      ) from None
    parts = [int(p) if p.isdigit() else p for p in re.findall(r"[\w-]+", key)]
    _set_value(tree, parts, text, key)
    try:
      ConfigDict(tree)
    except (AttributeError, ValueError, TypeError) as error:
      # A name that ConfigDict reserves, with dots, or not a string.
      raise ConfigError(f"--config.{shown_assignment}: {error}") from error
  return ConfigDict(tree)


def describe_difference(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
  """A line `KEY: OLD -> NEW` per setting that differs."""
  return [
    f"{key}: " + " -> ".join(truncate(repr(v), _MAX_CHARS) for v in values)
    for key, values in list_differences([old, new])
  ]


class _Absent:
  """Value of a key that a config lacks."""

  def __repr__(self) -> str:
    return "absent"


ABSENT = _Absent()


def list_differences(
  configs: Sequence[Any], key: str = ""
) -> list[tuple[str, tuple[Any, ...]]]:
  """Keys whose values differ between configs, and the values.

  A section that a config lacks is one key, with the value `ABSENT`. A list is
  one key unless it holds equally many sections in all configs (`data.train`).
  """
  if all(isinstance(config, Mapping) for config in configs):
    names = dict.fromkeys(name for config in configs for name in config)
    prefix = f"{key}." if key else ""
    children = {
      f"{prefix}{name}": [config.get(name, ABSENT) for config in configs]
      for name in names
    }
  elif (
    all(isinstance(config, list) for config in configs)
    and len({len(config) for config in configs}) == 1
    and all(isinstance(item, Mapping) for item in sum(configs, []))
  ):  # Lists of equally many sections.
    items = enumerate(zip(*configs, strict=True))
    children = {f"{key}[{i}]": values for i, values in items}
  elif all(config == configs[0] for config in configs):
    return []
  else:
    return [(key, tuple(configs))]
  return [
    row
    for name, values in children.items()
    for row in list_differences(values, name)
  ]


def _set_value(node: Any, parts: list[str | int], text: str, key: str) -> None:
  path = "config"
  for i, part in enumerate(parts):
    kind, name = (dict, "section") if isinstance(part, str) else (list, "list")
    if not isinstance(node, kind):
      raise ConfigError(f"--config.{key}: {path} is {node!r}, not a {name}.")
    if kind is list and part >= len(node):
      raise ConfigError(
        f"--config.{key}: {path} has {len(node)} entries; there is no [{part}]."
      )
    path += f".{part}" if kind is dict else f"[{part}]"
    old = node.get(part) if kind is dict else node[part]
    if i == len(parts) - 1:
      node[part] = _convert(text, old, path)
    elif old is None:
      node[part] = {}  # A section that the file omits.
    node = node[part]


def _convert(text: str, old: Any, path: str) -> Any:
  if text == "none" and old is None:
    return text  # Many options accept 'none' and default to None.
  if text == "None" or text.lower() == "none" and not isinstance(old, str):
    return None
  # A float may replace an int: durations and weights may be written as 5.
  if type(old) is int and isinstance(number := _parse_literal(text), float):
    return number
  return parse_value(text, old, f"--{path}")


def parse_value(text: str, old: Any, key: str) -> Any:
  """Parses a value to the type of the old value; None accepts any type.

  `text` is a Python literal, which may contain `dict(KEY=...)`, or a string.
  """
  if isinstance(old, str):
    return text
  value = _parse_literal(text)
  if isinstance(old, float) and type(value) is int:
    with contextlib.suppress(OverflowError):
      return float(value)
  if isinstance(value, dict) or type(value) is type(old):
    # A section may replace a number: a weight with a schedule.
    return value
  if isinstance(old, dict):
    why = f"this is a section; set one of its keys. {did_you_mean('', old)}"
    raise ConfigError(f"{key}={printable(text, _MAX_CHARS)}: {why}")
  if isinstance(old, bool | int | float):
    kind = type(old).__name__
    shown = printable(text, _MAX_CHARS)
    raise ConfigError(f"{key}={shown}: expected {kind}, such as {old!r}.")
  return value


def _parse_literal(text: str) -> Any:
  """Evaluates a Python literal; returns any other text unchanged."""
  if text.lower() in ("true", "false"):
    text = text.capitalize()
  try:
    return _evaluate_node(ast.parse(text.strip(), mode="eval").body)
  except (ValueError, SyntaxError):
    return text


def _evaluate_node(node: ast.expr) -> Any:
  if isinstance(node, ast.Call):
    name = node.func.id if isinstance(node.func, ast.Name) else None
    if name != "dict" or node.args or any(k.arg is None for k in node.keywords):
      raise InputError("only dict(KEY=VALUE, ...) may be called")
    return {k.arg: _evaluate_node(k.value) for k in node.keywords}
  if isinstance(node, ast.List):
    return [_evaluate_node(e) for e in node.elts]
  if isinstance(node, ast.Tuple):
    return tuple(_evaluate_node(e) for e in node.elts)
  if isinstance(node, ast.Dict):
    pairs = zip(node.keys, node.values, strict=True)
    return {ast.literal_eval(k): _evaluate_node(v) for k, v in pairs}
  return ast.literal_eval(node)
