"""Name tables: the tensors of a checkpoint for each parameter leaf.

A `Rule` says where leaves come from, the shapes the file must have and how the
numbers move, so that one table serves reading, writing and checking. Attention
is where layouts truly differ: ours fuses q, k and v into one kernel whose
columns run (head, q|k|v, dim), so that cutting it over devices cuts heads.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import unflatten_names

Arrays = tuple[np.ndarray, ...]


class ConversionError(InputError):
  """A checkpoint that can't become ours, or one of ours that can't be theirs.

  The message names every tensor or field, and the likely cause.
  """


@runtime_checkable
class Store(Protocol):
  """Named tensors, read one at a time."""

  @property
  def names(self) -> Iterable[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def read(self, name: str) -> np.ndarray: ...


# ---------------------------------------------------------------------------
# Layouts: how a kernel lies in the file.


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a library names and lays out its layers.

  Attributes:
    separator: between the parts of a name.
    kernel: the name of a dense layer's kernel.
    scale: the name of a layer norm's multiplier.
    transposed: kernels are [out, in] (PyTorch) rather than [in, out].
    split_heads: attention kernels keep heads as an axis of their own (Flax).
    mlp: names of an MLP's two layers.
  """

  separator: str
  kernel: str
  scale: str
  transposed: bool
  split_heads: bool
  mlp: tuple[str, str]

  def join(self, *parts: str) -> str:
    return self.separator.join(p for p in parts if p)

  def shape(self, n_in: int, n_out: int, *, split: tuple[int, ...] = ()):
    """A kernel's shape in the file; `split` is (heads, dim) or ()."""
    if self.transposed:
      return (n_out, n_in)
    return split if split else (n_in, n_out)

  def matrix(self, array: np.ndarray, n_in: int, n_out: int) -> np.ndarray:
    """A kernel of the file as [in, out]."""
    return array.T if self.transposed else array.reshape(n_in, n_out)

  def stored(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix [in, out] as the file wants it."""
    return matrix.T if self.transposed else matrix.reshape(shape)


TORCH = Layout(
  separator=".",
  kernel="weight",
  scale="weight",
  transposed=True,
  split_heads=False,
  mlp=("fc1", "fc2"),
)
FLAX = Layout(
  separator="/",
  kernel="kernel",
  scale="scale",
  transposed=False,
  split_heads=True,
  mlp=("Dense_0", "Dense_1"),
)


# ---------------------------------------------------------------------------
# Rules.


@dataclasses.dataclass(frozen=True)
class Rule:
  """Some of our leaves, the tensors they come from, and both ways between.

  Attributes:
    ours: names of our leaves, 'image/norm/scale'.
    theirs: names of the file's tensors; in a block's rule `{i}` stands for the
      layer, and our leaves get a leading [depth].
    shapes: what the file must have, one shape a tensor.
    to_ours: arrays in the order of `theirs` to arrays in the order of `ours`.
    to_theirs: the inverse; None where writing is not supported.
    depth: the number of layers of a block's rule, 0 outside blocks.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  to_ours: Callable[..., Arrays]
  to_theirs: Callable[..., Arrays] | None = None
  depth: int = 0

  def files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor name with its shape, layers counted out."""
    for i in range(max(self.depth, 1)):
      for name, shape in zip(self.theirs, self.shapes, strict=True):
        yield name.replace("{i}", str(i)), shape


def reshaped(
  ours: str, theirs: str, shape: Sequence[int], stored: Sequence[int]
) -> Rule:
  """The same numbers in the same order; `shape` is ours."""
  shape, stored = tuple(shape), tuple(stored)
  return Rule(
    (ours,),
    (theirs,),
    (stored,),
    to_ours=lambda a: (a.reshape(shape),),
    to_theirs=lambda a: (a.reshape(stored),),
  )


def vector(ours: str, theirs: str, size: int) -> Rule:
  return reshaped(ours, theirs, (size,), (size,))


def norm(layout: Layout, ours: str, theirs: str, width: int) -> list[Rule]:
  """A layer norm: scale and bias."""
  return [
    vector(f"{ours}/scale", layout.join(theirs, layout.scale), width),
    vector(f"{ours}/bias", layout.join(theirs, "bias"), width),
  ]


def dense(
  layout: Layout,
  ours: str,
  theirs: str,
  n_in: int,
  n_out: int,
  *,
  bias: str = "bias",
  split: tuple[int, ...] = (),
) -> list[Rule]:
  """A dense layer.

  Args:
    layout: the file's conventions.
    ours: our name of the layer.
    theirs: the file's.
    n_in: features in.
    n_out: features out.
    bias: the bias' name in the file, "" for a layer without.
    split: the kernel's shape in the file where the layout splits heads.
  """
  shape = layout.shape(n_in, n_out, split=split if layout.split_heads else ())
  rules = [
    Rule(
      (f"{ours}/kernel",),
      (layout.join(theirs, layout.kernel),),
      (shape,),
      to_ours=lambda a: (layout.matrix(a, n_in, n_out),),
      to_theirs=lambda a: (layout.stored(a, shape),),
    )
  ]
  if bias:
    rules.append(vector(f"{ours}/bias", layout.join(theirs, bias), n_out))
  return rules


def fuse(parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
  """Projections [..., H*dim] to one [..., H*n*dim], columns (head, n, dim)."""
  lead = parts[0].shape[:-1]
  split = [p.reshape(*lead, heads, -1) for p in parts]
  return np.stack(split, axis=-2).reshape(*lead, -1)


def unfuse(fused: np.ndarray, n: int, heads: int) -> Arrays:
  """The inverse of `fuse`: n arrays [..., H*dim]."""
  lead = fused.shape[:-1]
  parts = fused.reshape(*lead, heads, n, -1)
  return tuple(parts[..., k, :].reshape(*lead, -1) for k in range(n))


def fused(
  layout: Layout, ours: str, theirs: Sequence[str], width: int, heads: int
) -> list[Rule]:
  """Separate projections (q, k, v or k, v) of the file as one of ours."""
  n = len(theirs)
  split = (width, heads, width // heads) if layout.split_heads else ()
  shape = layout.shape(width, width, split=split)
  bias = split[1:] or (width,)

  def kernels(*arrays: np.ndarray) -> Arrays:
    return (fuse([layout.matrix(a, width, width) for a in arrays], heads),)

  def biases(*arrays: np.ndarray) -> Arrays:
    return (fuse([a.reshape(width) for a in arrays], heads),)

  return [
    Rule(
      (f"{ours}/kernel",),
      tuple(layout.join(t, layout.kernel) for t in theirs),
      (shape,) * n,
      to_ours=kernels,
      to_theirs=lambda a: tuple(
        layout.stored(p, shape) for p in unfuse(a, n, heads)
      ),
    ),
    Rule(
      (f"{ours}/bias",),
      tuple(layout.join(t, "bias") for t in theirs),
      (bias,) * n,
      to_ours=biases,
      to_theirs=lambda a: tuple(p.reshape(bias) for p in unfuse(a, n, heads)),
    ),
  ]


def in_projection(ours: str, theirs: str, width: int, heads: int) -> list[Rule]:
  """PyTorch's `nn.MultiheadAttention` input: one tensor, rows q, k, v.

  A pooling head asks with the probe and answers with the patches, so ours are
  two: q, and kv with columns (head, k|v, dim).
  """

  def to_ours(stacked: np.ndarray) -> Arrays:
    q, k, v = (
      part.reshape(width, -1).T if part.ndim > 1 else part
      for part in np.split(stacked, 3)
    )
    return q, fuse([k, v], heads)

  def to_theirs(q: np.ndarray, kv: np.ndarray) -> Arrays:
    # A transpose leaves a bias as it is.
    return (np.concatenate([p.T for p in (q, *unfuse(kv, 2, heads))]),)

  rules = []
  for leaf, name, shape in (
    ("kernel", "in_proj_weight", (3 * width, width)),
    ("bias", "in_proj_bias", (3 * width,)),
  ):
    rules.append(
      Rule(
        (f"{ours}/q/{leaf}", f"{ours}/kv/{leaf}"),
        (f"{theirs}.{name}",),
        (shape,),
        to_ours,
        to_theirs,
      )
    )
  return rules


def convolution(ours: str, theirs: str, patch: int, width: int) -> Rule:
  """PyTorch's patch convolution [D, 3, p, p] as rows ordered (py, px, c)."""

  def to_ours(a: np.ndarray) -> Arrays:
    return (a.transpose(2, 3, 1, 0).reshape(-1, width),)

  def to_theirs(a: np.ndarray) -> Arrays:
    return (a.reshape(patch, patch, 3, width).transpose(3, 2, 0, 1),)

  shape = (width, 3, patch, patch)
  return Rule((ours,), (theirs,), (shape,), to_ours, to_theirs)


def mlp(
  layout: Layout, ours: str, theirs: str, width: int, mlp_dim: int
) -> list[Rule]:
  """Two dense layers."""
  first, second = (layout.join(theirs, name) for name in layout.mlp)
  return [
    *dense(layout, f"{ours}/fc1", first, width, mlp_dim),
    *dense(layout, f"{ours}/fc2", second, mlp_dim, width),
  ]


@dataclasses.dataclass(frozen=True)
class BlockNames:
  """What a library calls the parts of a transformer block."""

  norm1: str
  q: str
  k: str
  v: str
  out: str
  norm2: str
  mlp: str
  scale1: str = ""
  scale2: str = ""


def blocks(
  layout: Layout,
  ours: str,
  theirs: str,
  names: BlockNames,
  *,
  width: int,
  heads: int,
  mlp_dim: int,
  depth: int,
  mlp_rules: Callable[..., list[Rule]] = mlp,
) -> list[Rule]:
  """A stack of blocks; `theirs` has `{i}` where the layer's number stands.

  Layer scale is in the table where `names` has it.
  """

  def at(name):
    return layout.join(theirs, name)

  attention = f"{ours}/attention"
  merge = (heads, width // heads, width)
  rules = [
    *norm(layout, f"{ours}/norm1", at(names.norm1), width),
    *fused(
      layout,
      f"{attention}/qkv",
      [at(names.q), at(names.k), at(names.v)],
      width,
      heads,
    ),
    *dense(
      layout, f"{attention}/out", at(names.out), width, width, split=merge
    ),
    *norm(layout, f"{ours}/norm2", at(names.norm2), width),
    *mlp_rules(layout, f"{ours}/mlp", at(names.mlp), width, mlp_dim),
  ]
  for scale, name in (("scale1", names.scale1), ("scale2", names.scale2)):
    if name:
      rules.append(vector(f"{ours}/{scale}", at(name), width))
  return [dataclasses.replace(rule, depth=depth) for rule in rules]


# ---------------------------------------------------------------------------
# Using a table.


def load(rules: Sequence[Rule], store: Store) -> dict[str, Any]:
  """Reads our tree; `checks.check` first.

  Returns:
    A nested dict of contiguous float32 arrays.
  """
  leaves: dict[str, np.ndarray] = {}
  for rule in rules:
    for i in range(max(rule.depth, 1)):
      arrays = [
        np.asarray(store.read(name.replace("{i}", str(i))), np.float32)
        for name in rule.theirs
      ]
      for name, value in zip(rule.ours, rule.to_ours(*arrays), strict=True):
        if not rule.depth:
          leaves[name] = np.ascontiguousarray(value).reshape(value.shape)
          continue
        if name not in leaves:
          leaves[name] = np.empty((rule.depth, *value.shape), np.float32)
        leaves[name][i] = value
  return unflatten_names(leaves)


def save(
  rules: Sequence[Rule], leaves: Mapping[str, Float[np.ndarray, "..."]]
) -> dict[str, np.ndarray]:
  """The file's tensors from our flat leaves; the inverse of `load`."""
  tensors: dict[str, np.ndarray] = {}
  for rule in rules:
    if rule.to_theirs is None:
      raise ConversionError(f"{rule.ours[0]} can't be written as {rule.theirs}")
    for i in range(max(rule.depth, 1)):
      arrays = [leaves[n][i] if rule.depth else leaves[n] for n in rule.ours]
      results = rule.to_theirs(*arrays)
      for (name, shape), value in zip(
        zip(rule.theirs, rule.shapes, strict=True), results, strict=True
      ):
        if value.shape != shape:
          raise ConversionError(
            f"{rule.ours[0]} gives {name} the shape {value.shape}; the spec "
            f"wants {shape}: params and spec are of different models."
          )
        # safetensors writes memory as it lies: a view would be wrong.
        value = np.ascontiguousarray(value).reshape(shape)
        tensors[name.replace("{i}", str(i))] = value
  return tensors
