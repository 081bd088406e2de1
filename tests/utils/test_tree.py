"""Names of leaves, and rules over them."""

from typing import NamedTuple

import flax.struct
import numpy as np
import pytest

from mtv_jax.utils.tree import (
  first_match,
  flatten_with_names,
  map_with_names,
  match_rules,
  unflatten_names,
)


class Moments(NamedTuple):
  mu: dict
  nu: dict


@flax.struct.dataclass
class State:
  step: int
  opt: tuple


TREE = State(0, (Moments({"a": {"b": 1}}, {"a": {"b": 2}}), None, {}, [3]))


def test_names_go_through_every_container():
  names = {"step": 0, "opt/0/mu/a/b": 1, "opt/0/nu/a/b": 2, "opt/3/0": 3}
  assert flatten_with_names(TREE) == [*names.items()]
  leaf = object()
  assert flatten_with_names({"a": leaf, "b": np.ones(2)})[0] == ("a", leaf)


def test_dictionaries():
  tree = {"a": {"x": {"y": 1}, "y": 2}, "b": 3}
  assert unflatten_names(dict(flatten_with_names(tree))) == tree
  other = {"a": {"x": {"y": 10}, "y": 20}, "b": 30}
  got = map_with_names(lambda n, x, y: f"{n}={x + y}", tree, other)
  assert got == {"a": {"x": {"y": "a/x/y=11"}, "y": "a/y=22"}, "b": "b=33"}


NAMES = [
  "heads/contrastive/logit_scale",
  "image/blocks/attention/qkv/kernel",
  "image/blocks/norm1/bias",
  "text/token_embedding",
]


def test_first_match_wins():
  rules = [("^image/.*bias$", 1), ("^image/", 2), ("embedding", 3)]
  matches = match_rules(NAMES, rules)
  assert [(m.name, m.pattern, m.value) for m in matches] == [
    (NAMES[0], None, None),
    (NAMES[1], "^image/", 2),
    (NAMES[2], "^image/.*bias$", 1),
    (NAMES[3], "embedding", 3),
  ]
  assert first_match(NAMES[2], rules) == 1
  with pytest.raises(ValueError, match="no rule matches 'z'.*'embedding'"):
    first_match("z", rules)


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    (("blocks/attention/qvk/kernel", 0), "names are: image/blocks/attention/q"),
    ((".*/bais$", 0), "names are: image/blocks/norm1/bias"),
    (("a(", 0), r"sharding: 'a\(' is not a regex"),
    ("ab", "a rule is a pair"),
    (("a",), "a rule is a pair"),
    (3, "a rule is a pair"),
    ((1, 2), "a rule is a pair"),
  ],
)
def test_bad_rules(rule, message):
  with pytest.raises(ValueError, match=message):
    match_rules(NAMES, [rule], what="sharding")
  matches = match_rules(NAMES, [("qvk", 0)], unused="allow")
  assert all(m.pattern is None for m in matches)
