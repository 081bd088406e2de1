"""Names of leaves, and rules over them."""

import dataclasses
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
  assert flatten_with_names(TREE) == [
    ("step", 0),
    ("opt/0/mu/a/b", 1),
    ("opt/0/nu/a/b", 2),
    ("opt/3/0", 3),
  ]


def test_unflatten_undoes_flatten_on_dictionaries():
  tree = {"image": {"blocks": {"kernel": 1, "bias": 2}}, "step": 3}
  assert unflatten_names(dict(flatten_with_names(tree))) == tree


def test_map_with_names():
  tree = {"a": {"x": 1, "y": 2}, "b": 3}
  other = {"a": {"x": 10, "y": 20}, "b": 30}
  got = map_with_names(lambda n, x, y: f"{n}={x + y}", tree, other)
  assert got == {"a": {"x": "a/x=11", "y": "a/y=22"}, "b": "b=33"}


NAMES = [
  "heads/contrastive/logit_scale",
  "image/blocks/attention/qkv/kernel",
  "image/blocks/norm1/bias",
  "text/token_embedding",
]


def test_first_match_wins():
  rules = [("^image/.*bias$", 1), ("^image/", 2), ("embedding", 3)]
  matches = match_rules(NAMES, rules)
  assert [m.value for m in matches] == [None, 2, 1, 3]
  assert [m.pattern for m in matches] == [
    None,
    "^image/",
    "^image/.*bias$",
    "embedding",
  ]
  assert [m.name for m in matches] == NAMES
  assert first_match(NAMES[2], rules) == 1
  with pytest.raises(ValueError, match="no rule matches 'z'.*'embedding'"):
    first_match("z", rules)


def test_a_rule_that_matches_nothing_is_an_error():
  rules = [("image/blocks/attention/qvk/kernel", 0)]
  with pytest.raises(ValueError, match="names are: image/blocks/attention/qkv"):
    match_rules(NAMES, rules, what="config.optim.rules")
  with pytest.raises(ValueError, match="names are: image/blocks/norm1/bias"):
    match_rules(NAMES, [(".*/bais$", 0)])
  matches = match_rules(NAMES, rules, unused="allow")
  assert all(m.pattern is None for m in matches)


def test_bad_rules():
  with pytest.raises(ValueError, match="sharding: 'a\\(' is not a regex"):
    match_rules(NAMES, [("a(", 0)], what="sharding")
  for rule in ("ab", ("a",), (1, 2)):
    with pytest.raises(ValueError, match="a rule is a pair"):
      match_rules(NAMES, [rule])


def test_leaves_may_be_anything():
  @dataclasses.dataclass
  class Opaque:
    x: int

  leaf = Opaque(1)
  assert flatten_with_names({"a": leaf, "b": np.ones(2)})[0] == ("a", leaf)
