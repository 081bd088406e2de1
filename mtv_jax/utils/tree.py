"""Pytree leaves by name, 'a/b/c', and rules that select them by regex.

Freezing, learning-rate and weight-decay multipliers, sharding and partial
loading address parameters this way: the first matching rule wins. Patterns
match anywhere in the name (`re.search`): '/bias$' is every bias, '^image/' the
image tower.
"""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, dataclass_transform, no_type_check

import flax.struct
import jax
import numpy as np

from mtv_jax.utils.errors import InputError, printable


@dataclass_transform(field_specifiers=(flax.struct.field,))
def pytree_dataclass(cls: type) -> type:
  """`flax.struct.dataclass` without run-time checks of annotations.

  JAX rebuilds trees with leaves that aren't arrays, which checks would reject.
  """
  return no_type_check(flax.struct.dataclass(cls))


def flatten_with_names(tree: Any) -> list[tuple[str, Any]]:
  """Returns pairs (name, leaf), in the order of `jax.tree.leaves`.

  Names come from dict keys, dataclass and named tuple fields, and sequence
  indices. Empty containers and None are dropped.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(_format_path(path), leaf) for path, leaf in leaves]


def fingerprint(tree: Any) -> str:
  """Hash of arrays: names, dtypes, shapes and values."""
  digest = hashlib.blake2b(digest_size=8)
  for name, leaf in flatten_with_names(tree):
    value = np.ascontiguousarray(leaf)
    digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()


def unflatten_names(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Builds nested dicts from names; the inverse of `flatten_with_names`."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def map_with_names(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` that passes the leaf's name as the first argument."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(_format_path(path), *leaves), tree, *rest
  )


def _format_path(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class RuleMatch:
  """The rule that matched a name; pattern and value are None if none did."""

  name: str
  pattern: str | None
  value: Any


def match_rules(
  names: Iterable[str],
  rules: Sequence[Any],
  *,
  what: str = "rules",
  unused: Literal["error", "allow"] = "error",
) -> list[RuleMatch]:
  """Returns the first matching rule (regex, value) of each name.

  `what` is the rules' config key, for errors. `unused='error'` catches typos in
  users' rules; 'allow' is for rules shared by many models.
  """
  names = list(names)
  compiled = [_compile_rule(rule, what) for rule in rules]
  if unused == "error":
    for regex, _ in compiled:
      if not any(map(regex.search, names)):
        pattern, hint = regex.pattern, closest_names(regex.pattern, names)
        raise InputError(f"{what}: {pattern!r} matches no parameter. {hint}")
  matches = []
  for name in names:
    hits = ((r.pattern, v) for r, v in compiled if r.search(name))
    matches.append(RuleMatch(name, *next(hits, (None, None))))
  return matches


def select_names(
  names: Iterable[str],
  patterns: Iterable[str],
  *,
  what: str = "patterns",
  unused: Literal["error", "allow"] = "allow",
) -> list[str]:
  """Returns names that match any pattern; errors as in `match_rules`."""
  rules = [(pattern, True) for pattern in patterns]
  matches = match_rules(names, rules, what=what, unused=unused)
  return [match.name for match in matches if match.value]


def first_match(name: str, rules: Sequence[Sequence[Any]]) -> Any:
  """Returns the value of the first rule that matches a name, or raises."""
  (match,) = match_rules([name], rules, unused="allow")
  if match.pattern is None:
    patterns = ", ".join(repr(rule[0]) for rule in rules)
    raise InputError(f"no rule matches {name!r}. The patterns are: {patterns}.")
  return match.value


def _compile_rule(rule: Any, what: str) -> tuple[re.Pattern, Any]:
  is_pair = isinstance(rule, Sequence) and len(rule) == 2
  if isinstance(rule, str) or not is_pair or not isinstance(rule[0], str):
    got = printable(repr(rule))
    raise InputError(f"{what}: a rule is a pair (regex, value), got {got}.")
  try:
    return re.compile(rule[0]), rule[1]
  except re.error as e:
    raise InputError(f"{what}: {rule[0]!r} is not a regex: {e}.") from None


def closest_names(pattern: str, names: Iterable[str]) -> str:
  """Closing sentence of an error about a pattern that matches nothing."""
  names = list(names)
  literal = re.sub(r"[\\^$.*+?()\[\]{}|]+", "", pattern)

  # Score name parts too, for patterns such as '.*/qvk/.*'.
  def score(name: str) -> float:
    return max(
      difflib.SequenceMatcher(None, literal.strip("/"), part).ratio()
      for part in [name, *name.split("/")]
    )

  hints = sorted(names, key=score, reverse=True)[:5]
  return f"The closest of {len(names)} names are: {', '.join(hints) or 'none'}."
