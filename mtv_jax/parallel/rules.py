"""Rules that shard parameters by name, and constraints in the compiled step.

The constraints shard activations by batch, and gather parameters before use
(FSDP). Without them the compiler may send all activations over the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mtv_jax.config.options import check_value
from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import (
  first_match,
  flatten_with_names,
  map_with_names,
  match_rules,
)

# (regex over names, axis or axes of each trailing dimension); the first match
# wins. Column-parallel into a block, row-parallel out of it (Megatron-LM):
# `tensor` costs one all-reduce per sublayer. QKV columns are ordered by head.
Axes = str | Sequence[str] | None
ShardingRules = Sequence[tuple[str, Sequence[Axes]]]
SHARDING_RULES: ShardingRules = (
  (r"attention/(qkv|q|kv)/kernel$", ("fsdp", "tensor")),
  (r"attention/(qkv|q|kv)/bias$", ("tensor",)),
  (r"attention/out/kernel$", ("tensor", "fsdp")),
  (r"mlp/(fc1|gate)/kernel$", ("fsdp", "tensor")),
  (r"mlp/(fc1|gate)/bias$", ("tensor",)),
  (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
  # LoRA: A and B split as the rows and columns of their kernel.
  (r"attention/(qkv|q|kv)/lora_a$|mlp/(fc1|gate)/lora_a$", ("fsdp", None)),
  (r"attention/(qkv|q|kv)/lora_b$|mlp/(fc1|gate)/lora_b$", (None, "tensor")),
  (r"attention/out/lora_a$|mlp/fc2/lora_a$", ("tensor", None)),
  (r"attention/out/lora_b$|mlp/fc2/lora_b$", (None, "fsdp")),
  (r"(patch_embed/kernel|token_embedding)$", (None, "fsdp")),
  (r"projection/kernel$", ("fsdp", None)),
  # DPT's convolutions: `[height, width, in, out]`.
  (r"(resize\d?|lateral\d|conv\d)/kernel$", (None, "fsdp")),
  # Prototypes of the self-distillation heads, sharded over all but `data`.
  (r"last_layer/kernel$", (None, ("fsdp", "tensor"))),
  (r"last_layer/scale$", (("fsdp", "tensor"),)),
  (r"", ()),
)


def partition_spec(
  axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh
) -> PartitionSpec:
  """Partition of an array, from a rule for its trailing dimensions.

  Drops leading axes until the rest divide the dimension (a vocabulary may have
  258 tokens).
  """
  if len(axes) > len(shape):
    axes = ()
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)

  def select_axes(axis, size):
    names = (axis,) if isinstance(axis, str) else tuple(axis or ())
    # Omit axes of size 1, so that logs show the actual sharding.
    names = tuple(n for n in names if mesh.shape[n] > 1) or names[-1:]
    while names and size % math.prod(mesh.shape[n] for n in names):
      names = names[1:]
    return names[0] if len(names) == 1 else names or None

  return PartitionSpec(*map(select_axes, axes, shape))


def tree_shardings(
  tree: PyTree, mesh: Mesh, rules: ShardingRules = ()
) -> PyTree:
  """Shardings for a tree of arrays or shapes, by its leaves' names.

  Names of optimizer moments, teacher and EMA end in the parameters' names, so
  that parameter rules also shard them. The config's `rules` precede the
  built-in rules.
  """
  all_rules = [*rules, *SHARDING_RULES]

  def sharding(name, leaf):
    axes = first_match(name, all_rules)
    return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))

  return map_with_names(sharding, tree)


def axis_names(axes: Sequence[Axes]) -> list[str]:
  """The mesh axes of a rule."""
  parts = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
  return [name for names in parts for name in names]


def check_sharding_rules(rules: Any, names: Iterable[str]) -> None:
  """Raises InputError for unused rules, and ConfigError for invalid axes."""
  match_rules(names, rules, what="config.sharding")
  for pattern, axes in rules:
    where = f"config.sharding: {pattern!r}"
    for axis in axis_names(check_value(axes, tuple[Axes, ...], where)):
      if axis not in MESH_AXES:
        hint = did_you_mean(str(axis), MESH_AXES)
        raise ConfigError(f"{where} names the axis {axis!r}. {hint}")


def sharding_table(
  abstract: PyTree,
) -> list[tuple[str, tuple[int, ...], str, int]]:
  """Rows (name, shape, partition, bytes per device)."""
  rows = []
  for name, leaf in flatten_with_names(abstract):
    shard_shape = leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(shard_shape) * np.dtype(leaf.dtype).itemsize
    rows.append((name, tuple(leaf.shape), str(leaf.sharding.spec), size))
  return rows


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
  products; `check_param_rules` rejects incompatible config rules. `keep` is a
  regex over names to leave sharded, such as stacked blocks, which a loop
  gathers one at a time. Casting to the compute `dtype` first sends less.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params

  def constrain(name, leaf):
    if re.search(keep, name):
      return leaf
    axes = first_match(name, SHARDING_RULES)
    gathered_sharding = NamedSharding(mesh, _gathered(axes, leaf.shape, mesh))
    if dtype is not None and "fsdp" in axis_names(axes):
      # Constrained before gathering, so that remat saves the sharded cast.
      split = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
      leaf = leaf.astype(dtype)
      leaf = jax.lax.with_sharding_constraint(leaf, split)
    return jax.lax.with_sharding_constraint(leaf, gathered_sharding)

  return map_with_names(constrain, params)


def _gathered(axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh):
  """Partition of an array that is gathered over `fsdp`."""
  other_axes = [tuple(n for n in axis_names([a]) if n != "fsdp") for a in axes]
  return partition_spec(other_axes, shape, mesh)


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
    actual, built_in = (
      NamedSharding(mesh, _gathered(first_match(name, every), leaf.shape, mesh))
      for every in ([*rules, *SHARDING_RULES], SHARDING_RULES)
    )
    if not actual.is_equivalent_to(built_in, len(leaf.shape)):
      raise ConfigError(
        f"config.sharding splits {name} over tensor as {actual.spec}: expected "
        f"{built_in.spec}, or mesh.fsdp=1 or mesh.tensor=1."
      )
