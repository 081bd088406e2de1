"""Transformer layers of both towers: attention, MLP, block, stack of blocks.

The parameters of a stack are one tree whose leaves have a leading `[depth]`,
whether it is scanned or unrolled, with any remat policy and any taps. So
checkpoints don't depend on how a model was run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from mtv_jax.models import kernels, positions
from mtv_jax.parallel.constraints import all_gather_params, constrain_batch
from mtv_jax.utils.errors import InputError, check_choice

Remat = Literal["none", "full", "dots", "dots_no_batch"]
# Policies that say what is saved of each block for the backward pass; the rest
# is recomputed. 'dots' saves every matrix product, the attention logits too;
# 'dots_no_batch' saves products with weights and recomputes attention.
REMAT: dict[Remat, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": (jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}

# Glorot and Bengio 2010; MLP biases start as in big_vision's ViT.
kernel_init = nn.initializers.xavier_uniform()
mlp_bias_init = nn.initializers.normal(1e-6)


def fused_init(
  key: Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
  """Xavier-uniform for a fused kernel `[D, n*D]` of n projections.

  The fan-out is D, that of one projection. With n*D, as in xavier_uniform of
  the fused kernel, attention would start sqrt((n + 1) / 2) times too small.
  """
  limit = np.sqrt(6 / (2 * shape[0]))
  return jax.random.uniform(key, shape, dtype, -limit, limit)


def gelu(x: Float[Array, "*n"], kind: str) -> Float[Array, "*n"]:
  """GELU (Hendrycks and Gimpel 2016).

  Args:
    x: any shape.
    kind: 'exact' (by the error function; DINOv2), 'tanh' (its approximation;
      SigLIP, big_vision) or 'quick' (x * sigmoid(1.702 x); CLIP).
  """
  if kind == "quick":
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=kind == "tanh")


def norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
  """LayerNorm with statistics in float32 for any compute dtype.

  The variance is that of the centred values: E[x^2] - E[x]^2 cancels in the few
  channels where CLIP and DINOv2 have activations in the hundreds.
  """
  return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


def project(
  pooled: Float[Array, "b d"],
  features: int | None,
  *,
  bias: bool = False,
) -> Float[Array, "b e"]:
  """The calling module's layer `projection` of pooled vectors, or identity.

  In float32: the product is small, and the embeddings are divided by a
  temperature later.
  """
  pooled = pooled.astype(jnp.float32)
  if features is None:
    return pooled
  return nn.Dense(features, use_bias=bias, name="projection")(pooled)


class Dense(nn.Module):
  """Linear layer x W + b; W starts Xavier-uniform by default."""

  features: int
  kernel_init: Callable = kernel_init
  bias_init: Callable = nn.initializers.zeros
  dtype: Any = jnp.float32  # Computation dtype; parameters are float32.
  use_bias: bool = True
  linear_fn: Callable[..., Array] = kernels.linear  # (x, W, b) -> x W + b

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    shape = (x.shape[-1], self.features)
    arrays = [x, self.param("kernel", self.kernel_init, shape)]
    if self.use_bias:
      arrays.append(self.param("bias", self.bias_init, (self.features,)))
    return self.linear_fn(*(a.astype(self.dtype) for a in arrays))


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection.

  The columns of `qkv` are ordered (head, q|k|v, dim), so that splitting them
  over devices splits whole heads and adds no communication.
  """

  heads: int
  causal: bool = False  # Whether a token sees only itself and those before it.
  dtype: Any = jnp.float32
  # (q, k, v, causal=) -> softmax(q k^T / sqrt(d)) v
  attention_fn: Callable[..., Array] = kernels.attention

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    angles: Float[Array, "#b n a"] | None = None,
  ) -> Float[Array, "b n d"]:
    """Attends; `angles` rotate queries and keys, see `positions.rotate`."""
    b, n, d = x.shape
    qkv = Dense(3 * d, fused_init, dtype=self.dtype, name="qkv")(x)
    qkv = qkv.reshape(b, n, self.heads, 3, d // self.heads)  # [B, N, H, 3, d]
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    if angles is not None:
      q, k = positions.rotate(q, angles), positions.rotate(k, angles)
    y = self.attention_fn(q, k, v, causal=self.causal)  # [B, N, H, d]
    return Dense(d, dtype=self.dtype, name="out")(y.reshape(b, n, d))


class CrossAttention(nn.Module):
  """Multi-head attention of queries to tokens, maybe of another width.

  The columns of `kv` are ordered (head, k|v, dim), see `Attention`.
  """

  heads: int
  dtype: Any
  # (q [..., H, d], k and v [B, N, H, d]) -> [B, ..., H, d]
  attention_fn: Callable[..., Array]

  @nn.compact
  def __call__(
    self, queries: Float[Array, "*q d"], tokens: Float[Array, "b n e"]
  ) -> Float[Array, "b *y d"]:
    b, n, _ = tokens.shape
    d = queries.shape[-1]
    q = Dense(d, dtype=self.dtype, name="q")(queries)
    kv = Dense(2 * d, fused_init, dtype=self.dtype, name="kv")(tokens)
    q = q.reshape(*q.shape[:-1], self.heads, -1)  # [..., H, d]
    kv = kv.reshape(b, n, self.heads, 2, d // self.heads)  # [B, N, H, 2, d]
    y = self.attention_fn(q, kv[:, :, :, 0], kv[:, :, :, 1])
    return Dense(d, dtype=self.dtype, name="out")(y.reshape(*y.shape[:-2], d))


class Mlp(nn.Module):
  """MLP with GELU, or SwiGLU (Shazeer 2020).

  SwiGLU is fc2(silu(gate(x)) * fc1(x)). The two halves are separate kernels:
  split over devices, each device has the same hidden units of both.
  """

  dim: int
  gelu: str = "tanh"
  kind: str = "plain"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    def dense(features, name):
      return Dense(
        features, bias_init=mlp_bias_init, dtype=self.dtype, name=name
      )

    y = dense(self.dim, "fc1")(x)
    if self.kind == "swiglu":
      y = jax.nn.silu(dense(self.dim, "gate")(x)) * y
    else:
      y = gelu(y, self.gelu)
    return dense(x.shape[-1], "fc2")(y)


class Block(nn.Module):
  """Pre-norm transformer block, with optional layer scale.

  x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x)); layer scale
  as in CaiT (Touvron et al. 2021). Drop path multiplies each branch of each
  example by a number, see `drop_path_scales`.
  """

  heads: int
  mlp_dim: int
  causal: bool = False
  gelu: str = "tanh"
  mlp: str = "plain"
  layer_scale: float | None = None
  norm_eps: float = 1e-6
  rope: positions.Rope | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    coordinates: Float[Array, "#b k 2"] | None = None,
    *,
    drop_path: Float[Array, "b 2"] | None = None,
    rope_draw: Float[Array, "2 2"] | None = None,
  ) -> Float[Array, "b n d"]:
    """Runs the block.

    Args:
      x: tokens.
      coordinates: of the last k tokens, which `rope` rotates.
      drop_path: multipliers of the branches of each example.
      rope_draw: their augmentation, of `Rope.draw`.
    """

    def scaled(y, branch):
      if self.layer_scale is not None:
        init = nn.initializers.constant(self.layer_scale)
        scale = self.param(f"scale{branch}", init, (x.shape[-1],))
        y = y * scale.astype(y.dtype)
      if drop_path is None:
        return y
      # In float32: 1 / keep rounded to bfloat16 would bias the expectation.
      return (y * drop_path[:, branch - 1, None, None]).astype(y.dtype)

    attention = Attention(self.heads, self.causal, self.dtype, name="attention")
    mlp = Mlp(self.mlp_dim, self.gelu, self.mlp, self.dtype, name="mlp")
    y = norm(self.norm_eps, self.dtype, "norm1")(x)
    x = x + scaled(attention(y, self._angles(x, coordinates, rope_draw)), 1)
    y = norm(self.norm_eps, self.dtype, "norm2")(x)
    return x + scaled(mlp(y), 2)

  def _angles(self, x, coordinates, draw):
    """Angles of all tokens, zero for those without coordinates."""
    if self.rope is None or coordinates is None:
      return None
    if draw is not None:
      coordinates = coordinates * draw[0] + draw[1]
    angles = self.rope.angles(coordinates, x.shape[-1] // self.heads)
    prefix = x.shape[1] - angles.shape[1]
    return jnp.pad(angles, ((0, 0), (prefix, 0), (0, 0)))


def drop_path_scales(
  keys: Key[Array, "b"], rate: float, depth: int, *, uniform: bool = True
) -> Float[Array, "b {depth} 2"]:
  """Multipliers of the two branches of each block and example (drop path).

  Stochastic depth (Huang et al. 2016): 0 with the probability `p` of the layer,
  else 1 / (1 - p), so that the expectation is the block without it. Each number
  is a function of the example's key, the layer and the branch alone.

  DINOv2 drops `p * b` random examples of a batch at rates above 0.1, and does
  not compute them: the same marginals, with a fixed number of examples.

  Args:
    keys: one for each example.
    rate: the probability, below 1.
    depth: number of blocks.
    uniform: whether all layers have this rate (DINOv2, DINOv3); else it rises
      linearly from 0 at the first one to `rate` at the last one (Huang et al.,
      DeiT).
  """
  rates = np.full(depth, rate) if uniform else np.linspace(0, rate, depth)
  keep = jnp.asarray(1 - rates, jnp.float32)[:, None]  # [depth, 1]
  u = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
  return jnp.where(u < keep, 1 / keep, 0.0)  # [B, depth, 2]


def stacked_init(
  block: nn.Module, depth: int, width: int, context: Sequence[Array] = ()
) -> Callable:
  """Initialiser of the stacked parameters of `depth` blocks `[b, n, width]`.

  `block` is a detached module (`parent=None`), `context` as of `run_stack`.
  """

  def example(x):
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
  context: Sequence[Array] = (),
  taps: Sequence[int] = (),
  remat: str = "none",
  scan: bool = True,
  mesh: Mesh | None = None,
  layer_inputs: Mapping[str, PyTree] | None = None,
) -> tuple[Float[Array, "b n d"], dict[int, Float[Array, "b n d"]]]:
  """Runs a stack of blocks.

  Args:
    block: the detached module that `stacked_init` took.
    stack: its stacked parameters.
    x: in the block's compute dtype.
    context: further arguments of every block, such as the tokens that a
      decoder attends to.
    taps: layers whose output to return, from 0. The scan runs over static
      slices of the stack that end at these layers, so that a tap costs only
      the array it returns.
    remat: what is saved for the backward pass, see `REMAT`: 'none' everything,
      'full' only each block's input, 'dots' the matrix products,
      'dots_no_batch' those with weights (attention is recomputed).
    scan: False unrolls the blocks, to count FLOPs or to let the compiler
      schedule across them. The values are the same.
    mesh: over which rows and parameters are sharded. Rows then stay on their
      devices, and each block's parameters are gathered over `fsdp` for the
      block, and again in the backward pass. Without this constraint the
      compiler may split channels over an axis of the batch.
    layer_inputs: further arguments of the block by name, whose leaves have a
      leading `[depth]`.

  Returns:
    The last block's output, and {layer: output} for the taps.

  Raises:
    InputError: for a tap outside the stack, or an unknown remat policy.
  """
  depth = jax.tree.leaves(stack)[0].shape[0]
  check_taps(taps, depth)
  check_choice("remat", remat, REMAT)

  def step(x, layer):
    params, inputs = layer
    x = constrain_batch(x, mesh)
    params = all_gather_params(params, mesh, dtype=block.dtype)
    return block.apply({"params": params}, x, *context, **inputs), None

  policy = REMAT[remat]
  if policy is None and mesh is not None and mesh.shape["fsdp"] > 1:
    policy = _save_all_but_gathered
  if policy is not None:
    # In a scan the loop keeps XLA from merging the recomputation with the
    # forward pass; unrolled blocks need a barrier.
    step = jax.checkpoint(step, policy=policy, prevent_cse=not scan)

  layers = (stack, dict(layer_inputs or {}))
  tapped = {}
  start = 0
  for end in sorted({*taps, depth - 1}):
    piece = jax.tree.map(lambda p, a=start, b=end + 1: p[a:b], layers)
    if scan:
      x, _ = jax.lax.scan(step, x, piece)
    else:
      for i in range(end + 1 - start):
        x, _ = step(x, jax.tree.map(lambda p, i=i: p[i], piece))
    if end in taps:
      tapped[end] = x
    start = end + 1
  return x, tapped


def run_blocks(
  module: nn.Module,
  block: nn.Module,
  x: Float[Array, "b n d"],
  *,
  depth: int,
  context: Sequence[Array] = (),
  taps: Sequence[int] = (),
  **inputs: Any,
) -> tuple[Float[Array, "b n d"], dict[int, Float[Array, "b n d"]]]:
  """`run_stack` of `depth` blocks, the parameter `blocks` of the module.

  `remat`, `scan` and `mesh` are attributes of the module.
  """
  init = stacked_init(block, depth, x.shape[-1], context)
  return run_stack(
    block,
    module.param("blocks", init),
    x,
    context=context,
    taps=taps,
    remat=module.remat,
    scan=module.scan,
    mesh=module.mesh,
    **inputs,
  )


class Tower(nn.Module):
  """Base class of the image and the text tower."""

  spec: Any
  dtype: Any = jnp.float32
  remat: str = "none"  # And scan and mesh: see `run_stack`.
  scan: bool = True
  mesh: Mesh | None = None

  def run_blocks(
    self,
    x: Float[Array, "b n d"],
    *,
    taps: Sequence[int] = (),
    layer_inputs: Mapping[str, PyTree] | None = None,
    context: Sequence[Array] = (),
    **options: Any,
  ) -> tuple[Float[Array, "b n d"], dict[int, Float[Array, "b n d"]]]:
    """Runs the tower's blocks, see `run_stack`, and its final norm.

    `options` are further ones of `Block`. Taps are before the final norm.
    """
    spec = self.spec
    block = Block(
      heads=spec.heads,
      mlp_dim=spec.mlp_dim,
      gelu=spec.gelu,
      norm_eps=spec.norm_eps,
      dtype=self.dtype,
      parent=None,
      **options,
    )
    x, tapped = run_blocks(
      self,
      block,
      x.astype(self.dtype),
      depth=spec.depth,
      taps=taps,
      layer_inputs=layer_inputs,
      context=context,
    )
    return norm(spec.norm_eps, self.dtype, "norm")(x), tapped


def _save_all_but_gathered(primitive, *_, **__) -> bool:
  """Checkpoint policy that saves everything but gathered parameters."""
  return primitive.name != "sharding_constraint"


def check_taps(taps: Sequence[int], depth: int) -> None:
  """Raises InputError unless every tap is a layer, 0 .. depth - 1."""
  bad = [i for i in taps if not 0 <= i < depth]
  if bad:
    raise InputError(
      f"taps {bad} are not layers of a tower of depth {depth}, which are "
      f"numbered 0 (output of the first block) to {depth - 1}."
    )


def check_tower(spec: Any) -> None:
  """Raises InputError for invalid fields that both towers' specs have."""
  name = type(spec).__name__
  for field in ("width", "depth", "heads", "mlp_dim"):
    if getattr(spec, field) < 1:
      raise InputError(
        f"{name}.{field} is {getattr(spec, field)}; it must be at least 1."
      )
  if spec.width % spec.heads:
    raise InputError(
      f"{name}.width {spec.width} is not divisible by its {spec.heads} heads. "
      f"Choose heads that divide it, or a multiple of {spec.heads} as width."
    )
  check_choice(f"{name}.gelu", spec.gelu, ("tanh", "exact", "quick"))
