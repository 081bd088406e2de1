"""Stacks of blocks, and the base class of the towers.

The parameters of a stack are one tree whose leaves have a leading `[depth]`,
whether the blocks are scanned or unrolled, for any remat policy and returned
layers. So checkpoints don't depend on these options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from mtv_jax.config import options
from mtv_jax.models.attention import build_attention
from mtv_jax.models.layers import Block, norm
from mtv_jax.models.linear import build_linear_fn
from mtv_jax.models.remat import build_policy
from mtv_jax.parallel.rules import all_gather_params, constrain_batch
from mtv_jax.utils.errors import ConfigError, InputError


def drop_path_scales(
  keys: Key[Array, " b"], rate: float, depth: int, *, uniform: bool = True
) -> Float[Array, "b {depth} 2"]:
  """Drop-path multipliers for both branches, per example and block.

  Stochastic depth (Huang et al. 2016): 0 with the layer's probability p, else
  1 / (1 - p), which preserves the expectation. A multiplier depends only on the
  example's key, the layer and the branch.

  At rates above 0.1 DINOv2 drops a fixed number `p * b` of random examples, and
  skips their computation; the marginals are equal.

  `uniform`: all layers have this rate (DINOv2, DINOv3); else it rises linearly
  from 0 at the first layer to `rate` at the last (Huang et al., DeiT).
  """
  rates = np.full(depth, rate) if uniform else np.linspace(0, rate, depth)
  keep = jnp.asarray(1 - rates, jnp.float32)[:, None]  # [depth, 1]
  u = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
  return jnp.where(u < keep, 1 / keep, 0.0)  # [B, depth, 2]


def stacked_init(
  block: nn.Module, depth: int, width: int, context: Sequence[Array | None] = ()
) -> Callable:
  """Initialiser of the stacked parameters of `depth` blocks on `[b, n, width]`.

  `block` is a detached module (`parent=None`); `context`: see `run_stack`.
  """

  def example(x):
    if x is None:
      return None
    if x.dtype == bool:  # A mask of tokens.
      return jnp.ones((1,) * x.ndim, bool)
    return jnp.zeros((*[1] * (x.ndim - 1), x.shape[-1]), x.dtype)

  def init_block(key):
    x = jnp.zeros((1, 1, width))
    return block.init(key, x, *map(example, context))["params"]

  return lambda key: jax.vmap(init_block)(jax.random.split(key, depth))


def run_stack(
  block: nn.Module,
  stack: Mapping[str, Any],
  x: Float[Array, "b n d"],
  *,
  context: Sequence[Array | None] = (),
  layers: Sequence[int] = (),
  remat: str = "none",
  scan: bool = True,
  mesh: Mesh | None = None,
  layer_inputs: Mapping[str, PyTree] | None = None,
) -> tuple[Float[Array, "b n d"], dict[int, Float[Array, "b n d"]]]:
  """Runs a stack of blocks; returns the output, and {layer: output}.

  Args:
    block: the detached module passed to `stacked_init`.
    stack: its stacked parameters.
    x: tokens in the block's compute dtype.
    context: further arguments of every block, such as tokens to attend to.
    layers: layers whose output to return, from 0. The scan runs over static
      slices of the stack that end at these layers, so that each costs only the
      array that it returns.
    remat: what to save for the backward pass, see `remat.build_policy`.
    scan: False unrolls the blocks, to count FLOPs or to let the compiler
      schedule across them. Values are unchanged.
    mesh: shards rows and parameters. Rows stay on their devices; each block
      gathers its parameters over `fsdp`, and again in the backward pass.
      Without this constraint the compiler may split channels over a batch axis.
    layer_inputs: arguments of the block by name; leaves `[depth, ...]`.
  """
  depth = jax.tree.leaves(stack)[0].shape[0]
  if layers:
    check_layers(layers, depth)
  policy = None if remat == "none" else build_policy(remat)
  has_fsdp = mesh is not None and mesh.shape["fsdp"] > 1

  def step(x, layer):
    params, inputs = layer
    x = constrain_batch(x, mesh)
    if has_fsdp:
      params = all_gather_params(params, mesh, dtype=block.dtype)
    return block.apply({"params": params}, x, *context, **inputs), None

  if policy is None and has_fsdp:
    policy = _save_all_but_gathered
  if policy is not None:
    # A scan prevents XLA from merging the recomputation with the forward pass;
    # unrolled blocks need a barrier.
    step = jax.checkpoint(step, policy=policy, prevent_cse=not scan)

  xs = (stack, dict(layer_inputs or {}))
  intermediates = {}
  start = 0
  for end in sorted({*layers, depth - 1}):
    chunk = jax.tree.map(lambda p, a=start, b=end + 1: p[a:b], xs)
    if scan:
      x, _ = jax.lax.scan(step, x, chunk)
    else:
      for i in range(end + 1 - start):
        x, _ = step(x, jax.tree.map(lambda p, i=i: p[i], chunk))
    if end in layers:
      intermediates[end] = x
    start = end + 1
  return x, intermediates


def block_options(spec: Any) -> dict[str, Any]:
  """The fields of a tower's spec that `Block` takes."""
  names = {f.name for f in dataclasses.fields(Block)}
  options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
  return {name: options[name] for name in names & options.keys()}


def final_norm(spec: Any, dtype: Any) -> Callable[[Array], Array]:
  """The norm after a tower's blocks, or the identity."""
  if not getattr(spec, "final_norm", True):
    return lambda x: x
  return norm(spec.norm_eps, dtype, "norm", spec.norm_kind)


class Tower(nn.Module):
  """Base class of the image and the text tower."""

  spec: Any
  dtype: Any = jnp.float32
  remat: str = "none"  # remat, scan, mesh: see `run_stack`.
  scan: bool = True
  mesh: Mesh | None = None
  attention: str = "auto"  # See `attention.CHOICES`.
  quantization: str = "none"  # See `linear.DTYPES`.

  def run_blocks(
    self, x: Float[Array, "b n d"], **inputs: Any
  ) -> tuple[Float[Array, "b n d"], dict[int, Float[Array, "b n d"]]]:
    """Runs the tower's blocks, then its final norm, if any.

    Inputs: `context`, `layer_inputs` and `layers` of `run_stack`. Outputs of
    `layers` lack the final norm.
    """
    spec = self.spec
    block = Block(
      **block_options(spec),
      dtype=self.dtype,
      attention_fn=build_attention(self.attention, self.mesh),
      linear_fn=build_linear_fn(self.quantization),
      parent=None,
    )
    context = inputs.get("context", ())
    init = stacked_init(block, spec.depth, x.shape[-1], context)
    stack = self.param("blocks", init)
    options = dict(remat=self.remat, scan=self.scan, mesh=self.mesh, **inputs)
    x, intermediates = run_stack(block, stack, x.astype(self.dtype), **options)
    return final_norm(spec, self.dtype)(x), intermediates


def _save_all_but_gathered(primitive, *_, **__) -> bool:
  """Checkpoint policy that saves everything but gathered parameters."""
  return primitive.name != "sharding_constraint"


def check_layers(layers: Sequence[int], depth: int) -> None:
  """Raises InputError unless all `layers` are in 0 .. depth - 1."""
  bad = [i for i in layers if not 0 <= i < depth]
  if bad:
    raise InputError(
      f"layers {bad} are not in a tower of depth {depth}: expected 0 (after "
      f"the first block) to {depth - 1}."
    )


def check_tower(spec: Any) -> None:
  """Raises InputError for invalid fields common to both towers' specs."""
  try:
    options.check_fields(spec)
  except ConfigError as error:
    raise InputError(str(error)) from None
  if spec.width % spec.heads:
    name = type(spec).__name__
    raise InputError(
      f"{name}.width {spec.width} is not divisible by its {spec.heads} heads: "
      "choose heads that divide it."
    )
