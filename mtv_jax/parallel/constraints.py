"""Sharding constraints inside the compiled step.

They shard activations by batch, and gather parameters before use (FSDP).
Without them the compiler may send all activations over the network.
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
  """Constrains arrays `[B, ...]` to the batch sharding.

  Otherwise the compiler may shard them by channels, like a parameter.
  """
  if mesh is None or mesh.size == 1:
    return tree

  def constrain(x):
    axes = (MESH_AXES[:2], *[None] * (x.ndim - 1))
    sharding = NamedSharding(mesh, partition_spec(axes, x.shape, mesh))
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(constrain, tree)


def all_gather_params(
  params: PyTree, mesh: Mesh | None, *, keep: str = "$^", dtype: Any = None
) -> PyTree:
  """Gathers parameters over `fsdp` before use.

  They stay sharded over `tensor` by `SHARDING_RULES`, like a layer's matrix
  products; `check_param_rules` rejects incompatible config rules.

  Args:
    params: a tree whose names `SHARDING_RULES` match.
    mesh: None for one device.
    keep: a regex over names to leave sharded, such as stacked blocks, which a
      loop gathers one at a time.
    dtype: the compute dtype; casting before gathering sends less.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params

  def constrain(name, leaf):
    if re.search(keep, name):
      return leaf
    axes = first_match(name, SHARDING_RULES)
    whole = NamedSharding(mesh, _gathered(axes, leaf.shape, mesh))
    if dtype is not None and "fsdp" in axis_names(axes):
      # Constrained before gathering, so that remat saves the sharded cast.
      part = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
      leaf = leaf.astype(dtype)
      leaf = jax.lax.with_sharding_constraint(leaf, part)
    return jax.lax.with_sharding_constraint(leaf, whole)

  return map_with_names(constrain, params)


def _gathered(axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh):
  """The partition of an array without `fsdp`."""
  without = [tuple(n for n in axis_names([a]) if n != "fsdp") for a in axes]
  return partition_spec(without, shape, mesh)


def check_param_rules(
  params: PyTree, mesh: Mesh, rules: ShardingRules, *, keep: str = "$^"
) -> None:
  """Raises ConfigError for sharding rules that layers can't follow.

  On a mesh with both `fsdp` and `tensor`, a rule with `tensor` on a different
  dimension than the built-in rule would reshard the parameters in each layer.
  `keep`: see `all_gather_params`.
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
        f"config.sharding splits {name} over tensor as {given}, but layers "
        f"gather it over fsdp to {built_in}. Name tensor as SHARDING_RULES "
        "does, or set mesh.fsdp=1 or mesh.tensor=1."
      )
