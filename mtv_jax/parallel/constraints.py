"""What a compiled program says of where its arrays lie.

`sharding` places what a run holds. Inside the step the compiler decides, and
left alone it may decide to send all activations over the network: so rows stay
where they are, and parameters are gathered where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.parallel.rules import (
  SHARDING_RULES,
  Axes,
  ShardingRules,
  axis_names,
  partition_spec,
)
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import first_match, flatten_with_names, map_with_names


def constrain_batch(tree: PyTree, mesh: Mesh | None) -> PyTree:
  """Says that arrays `[b, ...]` of a compiled program are split as the batch.

  Left to itself the compiler may split them by channels, after a parameter
  that is, and gather the rows of all devices.
  """
  if mesh is None:
    return tree

  def place(x):
    axes = (MESH_AXES[:2], *[None] * (x.ndim - 1))
    placing = NamedSharding(mesh, partition_spec(axes, x.shape, mesh))
    return jax.lax.with_sharding_constraint(x, placing)

  return jax.tree.map(place, tree)


def all_gather_params(
  params: PyTree, mesh: Mesh | None, *, keep: str = "$^", dtype: Any = None
) -> PyTree:
  """Parameters gathered over `fsdp`, as a compiled program uses them.

  The devices along `fsdp` hold parts of a parameter, but rows of their own: a
  layer is to gather the former and never the latter. Each parameter is
  gathered by itself, where it is used, whichever of its dimensions lies along
  `fsdp`. Along `tensor` it lies as `SHARDING_RULES` say, since a layer's
  products are split so; rules of the config that say otherwise are refused by
  `check_param_rules`, as here, within a layer, their names are no longer known.

  Args:
    params: by names that `SHARDING_RULES` match.
    mesh: None for one device.
    keep: a regex over names that are left as they lie, such as those of
      stacked blocks, of which a loop gathers one at a time.
    dtype: what is gathered is cast to it first, so that less is sent; give the
      one that it is computed with anyway.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params

  def place(name, leaf):
    if re.search(keep, name):
      return leaf
    axes = first_match(name, SHARDING_RULES)
    whole = NamedSharding(mesh, _gathered(axes, leaf.shape, mesh))
    if dtype is not None and "fsdp" in axis_names(axes):
      # And stays where it lies: what is saved of it is then a part as well.
      part = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
      leaf = leaf.astype(dtype)
      leaf = jax.lax.with_sharding_constraint(leaf, part)
    return jax.lax.with_sharding_constraint(leaf, whole)

  return map_with_names(place, params)


def _gathered(axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh):
  """A rule's axes for one array without `fsdp`."""
  without = [tuple(n for n in axis_names([a]) if n != "fsdp") for a in axes]
  return partition_spec(without, shape, mesh)


def check_param_rules(
  params: PyTree, mesh: Mesh, rules: ShardingRules, *, keep: str = "$^"
) -> None:
  """Raises ConfigError for sharding rules that layers can't follow.

  On a mesh with both `fsdp` and `tensor`, a rule that puts `tensor` elsewhere
  than the built-in ones would have each layer move its parameters every time.

  Args:
    params: arrays or shapes, under their full names.
    mesh: from `make_mesh`.
    rules: the config's own.
    keep: as for `all_gather_params`.
  """
  if mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] == 1:
    return
  for name, leaf in flatten_with_names(params):
    if re.search(keep, name):
      continue
    given, built_in = (
      _gathered(first_match(name, every), leaf.shape, mesh)
      for every in ([*rules, *SHARDING_RULES], SHARDING_RULES)
    )
    if not NamedSharding(mesh, given).is_equivalent_to(
      NamedSharding(mesh, built_in), len(leaf.shape)
    ):
      raise ConfigError(
        f"config.sharding places {name} along tensor as {given}, but layers "
        f"use it as {built_in} where fsdp gathers it. Name tensor as the "
        "built-in rule does (SHARDING_RULES in mtv_jax/parallel/rules.py), or "
        "set mesh.fsdp=1 or mesh.tensor=1."
      )
