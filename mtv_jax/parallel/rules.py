"""Rules that shard parameters over the mesh, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import (
  first_match,
  flatten_with_names,
  map_with_names,
  match_rules,
)

# (regex over names, axis or axes of each trailing dimension); the first match
# wins. Column-parallel into a block, row-parallel out of it: `tensor` costs one
# all-reduce per sublayer (Shoeybi et al. 2019, Megatron-LM). QKV columns are
# ordered by head, so that a shard has whole heads.
Axes = str | Sequence[str] | None
ShardingRules = Sequence[tuple[str, Sequence[Axes]]]
SHARDING_RULES: ShardingRules = (
  (r"attention/(qkv|q|kv)/kernel$", ("fsdp", "tensor")),
  (r"attention/(qkv|q|kv)/bias$", ("tensor",)),
  (r"attention/out/kernel$", ("tensor", "fsdp")),
  (r"mlp/(fc1|gate)/kernel$", ("fsdp", "tensor")),
  (r"mlp/(fc1|gate)/bias$", ("tensor",)),
  (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
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
  """Partition of one array, from a rule for its trailing dimensions.

  Drops axes, from the first on, until the rest divide the dimension (a
  vocabulary may be 258).
  """
  if len(axes) > len(shape):
    axes = ()
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)

  def whole_or_part(axis, size):
    names = (axis,) if isinstance(axis, str) else tuple(axis or ())
    # Omit axes of size 1, so that logs show the actual sharding.
    names = tuple(n for n in names if mesh.shape[n] > 1) or names[-1:]
    while names and size % math.prod(mesh.shape[n] for n in names):
      names = names[1:]
    return names[0] if len(names) == 1 else names or None

  return PartitionSpec(*map(whole_or_part, axes, shape))


def tree_shardings(
  tree: PyTree, mesh: Mesh, rules: ShardingRules = ()
) -> PyTree:
  """Shardings for a tree of arrays or shapes, by its leaves' names.

  Names of optimizer moments, teacher and EMA end in the parameters' names, so
  that parameter rules also shard them. The config's `rules` precede the
  built-in rules.
  """
  every = [*rules, *SHARDING_RULES]

  def sharding(name, leaf):
    axes = first_match(name, every)
    return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))

  return map_with_names(sharding, tree)


def axis_names(axes: Sequence[Axes]) -> list[str]:
  """The mesh axes of a rule."""
  every = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
  return [name for names in every for name in names]


def check_sharding_rules(rules: ShardingRules, names: Iterable[str]) -> None:
  """Raises InputError for unused rules, and ConfigError for unknown axes."""
  match_rules(names, rules, what="config.sharding")
  for pattern, axes in rules:
    for axis in axis_names(axes):
      if axis not in MESH_AXES:
        raise ConfigError(
          f"config.sharding: {pattern!r} names the axis {axis!r}. "
          f"{did_you_mean(str(axis), MESH_AXES)}"
        )


def sharding_table(
  abstract: PyTree,
) -> list[tuple[str, tuple[int, ...], str, int]]:
  """Rows (name, shape, partition, bytes per device)."""
  rows = []
  for name, leaf in flatten_with_names(abstract):
    local = leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(local) * np.dtype(leaf.dtype).itemsize
    rows.append((name, tuple(leaf.shape), str(leaf.sharding.spec), size))
  return rows
