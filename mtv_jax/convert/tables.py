"""Name tables that map our parameter leaves to checkpoint tensors.

A family's table maps our layers and leaves to names in its files. `leaf_rules`
derives shapes and conversions in both directions, so one table serves reading,
checking and writing. Columns of our fused projections are ordered
(head, q|k|v, dim), so that sharding the columns shards heads.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, PyTree

from mtv_jax.models import two_tower
from mtv_jax.models.text import TextSpec
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViTSpec
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import flatten_with_names

Tensors = tuple[np.ndarray, ...]
# Names in the file by our layer ("image/norm") or leaf ("image/cls_token").
# `{i}` is the block index, a tuple lists projections that we fuse, and None
# marks a leaf that the file lacks.
Names = Mapping[str, str | tuple[str, ...] | None]
# PyTorch: kernels [out, in]. Flax: kernels [in, out], attention kernels with
# a head axis.
Layout = Literal["torch", "flax"]
_SUFFIXES: Mapping[str, Mapping[str, str]] = {
  "torch": {"kernel": ".weight", "scale": ".weight", "bias": ".bias"},
  "flax": {"kernel": "/kernel", "scale": "/scale", "bias": "/bias"},
}


class ConversionError(InputError):
  """Raised if a checkpoint or a model can't be converted.

  The message names the tensors or fields, and the likely cause.
  """


@dataclasses.dataclass(frozen=True)
class Rule:
  """Conversion between some of our leaves and tensors of a file.

  Attributes:
    leaves: names of our leaves, such as 'image/norm/scale'.
    tensors: names of the file's tensors. With the block index `{i}`, our leaves
      have a leading axis [depth].
    shapes: shapes in the file, one per tensor.
    read: maps the arrays of `tensors` to the arrays of `leaves`.
    write: the inverse of `read`.
    depth: number of blocks; 0 outside blocks.
    default: arrays for tensors that a file may lack.
  """

  leaves: tuple[str, ...]
  tensors: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  read: Callable[..., Tensors]
  write: Callable[..., Tensors]
  depth: int = 0
  default: Tensors | None = None

  def expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, block by block."""
    for i in range(max(self.depth, 1)):
      for name, shape in zip(self.tensors, self.shapes, strict=True):
        yield name.replace("{i}", str(i)), shape


def nest(prefix: str, file_prefix: str, names: Names) -> Names:
  """Adds `prefix` to our names and `file_prefix` to the file's names."""

  def add_prefix(name: str | tuple[str, ...] | None) -> Any:
    if isinstance(name, tuple):
      return tuple(file_prefix + part for part in name)
    return name and file_prefix + name

  return {prefix + key: add_prefix(name) for key, name in names.items()}


def tower_rules(
  spec: ModelSpec, names: Names, *special: Rule, **options: Any
) -> list[Rule]:
  """Conversion rules for both towers; arguments as in `leaf_rules`."""
  rules = []
  for tower, params in two_tower.abstract_params(spec).items():
    heads = getattr(spec, tower).heads
    params = {tower: params}
    rules += leaf_rules(params, names, *special, heads=heads, **options)
  return [*special, *rules]


def leaf_rules(
  params: PyTree,
  names: Names,
  *special: Rule,
  heads: int = 1,
  layout: Layout = "torch",
  num_unit_axes: Mapping[str, int] | None = None,
) -> list[Rule]:
  """One rule per leaf of a tree of arrays or shapes.

  Skips leaves of `special` rules. `num_unit_axes` is the number of leading axes
  of size 1 in the file, by leaf.
  """
  skipped = {name for rule in special for name in rule.leaves}
  rules = []
  for name, leaf in flatten_with_names(params):
    if name in skipped or (name in names and names[name] is None):
      continue
    tensors, suffix = names.get(name), ""
    if tensors is None:
      layer, _, kind = name.rpartition("/")
      tensors, suffix = names[layer], _SUFFIXES[layout][kind]
    tensors = (tensors,) if isinstance(tensors, str) else tensors
    depth = leaf.shape[0] if "{i}" in tensors[0] else 0
    *lead, width = leaf.shape[1:] if depth else leaf.shape
    shape = (*lead, width // len(tensors))
    axes = (1,) * (num_unit_axes or {}).get(name, 0)
    axes, order = _compute_file_axes(name, (*axes, *shape), layout, heads)
    tensors = [t + suffix for t in tensors]
    rule = transpose_rule(name, tensors, shape, axes, order)
    rule = dataclasses.replace(rule, depth=depth)
    rules.append(_fuse_rule(rule, heads) if len(tensors) > 1 else rule)
  return rules


def _compute_file_axes(
  name: str, shape: tuple[int, ...], layout: Layout, heads: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Computes the axes to split a leaf into, and their order in the file."""
  *_, layer, leaf = f"/{name}".split("/")
  if leaf == "kernel" and layer == "patch_embed":
    # Rows are ordered (y, x, channel).
    patch = math.isqrt(shape[0] // 3)
    shape = (patch, patch, 3, shape[1])
  if layout == "flax":
    if layer in ("q", "kv", "qkv"):
      shape = (*shape[:-1], heads, shape[-1] // heads)
    elif layer == "out" and leaf == "kernel":
      shape = (heads, shape[0] // heads, shape[1])
  elif leaf == "kernel":
    return shape, (1, 0) if len(shape) == 2 else (3, 2, 0, 1)
  return shape, tuple(range(len(shape)))


def transpose_rule(
  leaf: str,
  tensors: str | Sequence[str],
  shape: tuple[int, ...],
  axes: tuple[int, ...],
  order: tuple[int, ...] | None = None,
  *,
  file_shape: tuple[int, ...] | None = None,
) -> Rule:
  """A rule for a leaf whose axes are transposed in the file.

  The leaf, of `shape`, is split into `axes`, which the file stores in `order`,
  by default unchanged. `file_shape` may merge axes. Several tensors share one
  shape.
  """
  tensors = (tensors,) if isinstance(tensors, str) else tuple(tensors)
  order = tuple(range(len(axes))) if order is None else order
  inverse = tuple(np.argsort(order))
  file_axes = tuple(axes[i] for i in order)
  stored_shape = file_axes if file_shape is None else file_shape
  return Rule(
    (leaf,),
    tensors,
    (stored_shape,) * len(tensors),
    read=lambda *arrays: tuple(
      a.reshape(file_axes).transpose(inverse).reshape(shape) for a in arrays
    ),
    write=lambda *arrays: tuple(
      a.reshape(axes).transpose(order).reshape(stored_shape) for a in arrays
    ),
  )


def transposed_conv_rule(
  leaf: str, tensor: str, factor: int, channels: int
) -> Rule:
  """A rule for a transposed-convolution kernel whose stride is its size.

  The file's kernel is [in, out, y, x]; our columns are (y, x, out).
  """
  return transpose_rule(
    leaf,
    tensor,
    (channels, factor**2 * channels),
    (channels, factor, factor, channels),
    (0, 3, 1, 2),
  )


def _fuse_rule(rule: Rule, heads: int) -> Rule:
  """Extends a rule to fuse the file's q, k and v, or its k and v."""
  n = len(rule.tensors)
  return dataclasses.replace(
    rule,
    read=lambda *arrays: (fuse(rule.read(*arrays), heads),),
    write=lambda array: rule.write(*unfuse(array, n, heads)),
  )


def fuse(parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
  """Fuses n [..., H*dim] to [..., H*n*dim], columns (head, n, dim)."""
  lead = parts[0].shape[:-1]
  split = [p.reshape(*lead, heads, -1) for p in parts]
  return np.stack(split, axis=-2).reshape(*lead, -1)


def unfuse(fused: np.ndarray, n: int, heads: int) -> Tensors:
  """The inverse of `fuse`: n arrays [..., H*dim]."""
  lead = fused.shape[:-1]
  parts = fused.reshape(*lead, heads, n, -1)
  return tuple(parts[..., k, :].reshape(*lead, -1) for k in range(n))


def stacked_projections(
  layers: Mapping[str, int],
  file_layer: str,
  width: int,
  heads: int,
  *,
  depth: int = 0,
  order: Int[np.ndarray, " c"] | None = None,
) -> list[Rule]:
  """Rules for projections stacked in one tensor, rows (part, head, dim).

  `layers` maps our layers to the number of parts that each fuses: {"qkv": 3},
  or {"q": 1, "kv": 2} for a pooling `nn.MultiheadAttention`. The names in the
  file are `file_layer` with "weight" and "bias". `order` maps our channels of a
  head to the file's, for queries and keys with a different rotary layout.
  """
  counts = tuple(layers.values())

  def permute(parts: Sequence[np.ndarray], invert: bool) -> list[np.ndarray]:
    if order is None:
      return [*parts]
    channels = np.argsort(order) if invert else order

    def split(part: np.ndarray) -> np.ndarray:
      return part.reshape(*part.shape[:-1], heads, -1)

    permuted = [split(p)[..., channels].reshape(p.shape) for p in parts[:2]]
    return [*permuted, *parts[2:]]

  def read(rows: np.ndarray) -> Tensors:
    # Transposing a bias is a no-op.
    parts = iter(permute([p.T for p in np.split(rows, sum(counts))], False))
    return tuple(fuse([next(parts) for _ in range(n)], heads) for n in counts)

  def write(*arrays: np.ndarray) -> Tensors:
    pairs = zip(arrays, counts, strict=True)
    parts = [part for array, n in pairs for part in unfuse(array, n, heads)]
    return (np.concatenate([part.T for part in permute(parts, True)]),)

  rows = sum(counts) * width
  return [
    Rule(
      tuple(f"{layer}/{leaf}" for layer in layers),
      (f"{file_layer}{name}",),
      (shape,),
      read,
      write,
      depth,
    )
    for leaf, name, shape in (
      ("kernel", "weight", (rows, width)),
      ("bias", "bias", (rows,)),
    )
  ]


def stacked_qkv(
  tower: str,
  spec: ViTSpec | TextSpec,
  file_layer: str,
  order: Int[np.ndarray, " c"] | None = None,
) -> list[Rule]:
  """Rules for stacked queries, keys and values of all blocks of a tower."""
  layers, depth = {f"{tower}/blocks/attention/qkv": 3}, spec.depth
  return stacked_projections(
    layers, file_layer, spec.width, spec.heads, depth=depth, order=order
  )


def split_rows(rule: Rule, *tensors: str | None) -> Rule:
  """Splits a rule's tensor into the file's `tensors`, by rows.

  None: zeros that the file lacks.
  """
  (shape,) = rule.shapes
  names = tuple(filter(None, tensors))

  def read(*arrays: np.ndarray) -> Tensors:
    stored, zeros = iter(arrays), np.zeros_like(arrays[0])
    parts = [next(stored) if name else zeros for name in tensors]
    return rule.read(np.concatenate(parts))

  def write(*arrays: np.ndarray) -> Tensors:
    parts = np.split(rule.write(*arrays)[0], len(tensors))
    return tuple(p for p, name in zip(parts, tensors, strict=True) if name)

  part = (shape[0] // len(tensors), *shape[1:])
  return dataclasses.replace(
    rule, tensors=names, shapes=(part,) * len(names), read=read, write=write
  )


def constant(tensor: str, value: np.ndarray, dtype: str = "float32") -> Rule:
  """A rule for a constant tensor that is not one of our parameters."""
  value = np.asarray(value, dtype)
  return Rule(
    (),
    (tensor,),
    (value.shape,),
    read=lambda _: (),
    write=lambda: (value,),
  )


def scale_without_bias(scale: str, shape: tuple[int, ...]) -> Rule:
  """Temperature rule for a softmax loss; sets our bias to 0."""
  return Rule(
    ("heads/contrastive/logit_scale", "heads/contrastive/logit_bias"),
    (scale,),
    (shape,),
    read=lambda a: (a.reshape(()), np.zeros((), np.float32)),
    write=lambda a, _: (a.reshape(shape),),
  )


def scale_and_bias(
  scale: str, bias: str, shape: tuple[int, ...] = (1,)
) -> list[Rule]:
  """Rules for the temperature and bias of a sigmoid loss."""
  return [
    transpose_rule(f"heads/contrastive/{leaf}", tensor, (), shape)
    for leaf, tensor in (("logit_scale", scale), ("logit_bias", bias))
  ]


def folded_positions(
  tokens: Mapping[str, str],
  positions: str,
  spec: ViTSpec,
  *,
  is_flat: bool = False,
) -> Rule:
  """A rule that folds the prefix tokens' position embeddings into the tokens.

  `tokens` maps our leaves, the CLS token and registers, to names in the file.
  `positions` names the file's table, which starts with their positions. The
  file's tensors have leading axes of size 1, unless `is_flat`.
  """
  width = spec.width
  counts = [1 if "cls_token" in leaf else spec.registers for leaf in tokens]
  rows = sum(counts) + spec.grid**2
  shapes = [(width,) if is_flat else (1, count, width) for count in counts]
  shapes.append((rows, width) if is_flat else (1, rows, width))

  def read(*arrays: np.ndarray) -> Tensors:
    *prefix, table = arrays
    *parts, patches = np.split(table.reshape(rows, width), np.cumsum(counts))
    folded = [
      (token.reshape(part.shape) + part).reshape(
        (-1, width) if "registers" in leaf else width
      )
      for token, part, leaf in zip(prefix, parts, tokens, strict=True)
    ]
    return (*folded, patches)

  def write(*arrays: np.ndarray) -> Tensors:
    *prefix, table = arrays
    # Our tokens include their position embeddings.
    table = np.concatenate([np.zeros_like(table[: sum(counts)]), table])
    values = zip([*prefix, table], shapes, strict=True)
    return tuple(value.reshape(shape) for value, shape in values)

  return Rule(
    (*tokens, "image/position_embedding"),
    (*tokens.values(), positions),
    tuple(shapes),
    read,
    write,
  )
