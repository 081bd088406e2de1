"""Sharding constraints inside the compiled step.

The compiler may otherwise choose to send all activations over the network. The
constraints split activations by batch, and gather parameters where they are
read (FSDP).
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
  """Constrains arrays `[B, ...]` to be split like the batch.

  Otherwise the compiler may split them by channels, like a parameter.
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
  """Gathers parameters over `fsdp` before their use.

  Over `tensor` they stay split by `SHARDING_RULES`, as a layer's matrix
  products are; `check_param_rules` rejects other rules of the config.

  Args:
    params: by names that `SHARDING_RULES` match.
    mesh: None for one device.
    keep: a regex over names that are not gathered, such as those of stacked
      blocks, of which a loop gathers one at a time.
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
      # Constrained before, so that what remat saves of it is sharded as well.
      part = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
      leaf = leaf.astype(dtype)
      leaf = jax.lax.with_sharding_constraint(leaf, part)
    return jax.lax.with_sharding_constraint(leaf, whole)

  return map_with_names(constrain, params)


def _gathered(axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh):
  """The partition of one array without `fsdp`."""
  without = [tuple(n for n in axis_names([a]) if n != "fsdp") for a in axes]
  return partition_spec(without, shape, mesh)


def check_param_rules(
  params: PyTree, mesh: Mesh, rules: ShardingRules, *, keep: str = "$^"
) -> None:
  """Raises ConfigError for sharding rules that layers can't follow.

  On a mesh with both `fsdp` and `tensor`, a rule with `tensor` on another
  dimension than the built-in rule would reshard the parameters in each layer.
  `keep` is that of `all_gather_params`.
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
