"""What both towers are made of: attention, MLP, block, and a stack of blocks.

A stack is one parameter tree whose leaves have a leading `[depth]`, whatever
way it is run: scanned or unrolled, with any remat policy, tapped at any layer.
A checkpoint therefore says nothing of how it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mtv_jax.models import attention as attention_lib
from mtv_jax.parallel.constraints import all_gather_params, constrain_batch
from mtv_jax.utils.errors import check_choice, did_you_mean

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

# Kernels: Glorot and Bengio 2010, as in big_vision's ViT, whose MLP biases
# start at a whisper of noise as well.
kernel_init = nn.initializers.xavier_uniform()
mlp_bias_init = nn.initializers.normal(1e-6)


def fused_init(
  key: Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
  """Xavier-uniform for a kernel `[D, n*D]` that is n projections side by side.

  Each projection is its own [D, D] matrix: reckoning with a fan-out of n*D, as
  a plain xavier_uniform would, starts attention sqrt((n + 1) / 2) times too
  small.
  """
  limit = np.sqrt(6 / (2 * shape[0]))
  return jax.random.uniform(key, shape, dtype, -limit, limit)


def gelu(x: Float[Array, "*n"], kind: str) -> Float[Array, "*n"]:
  """GELU (Hendrycks and Gimpel 2016) in one of its three spellings.

  Args:
    x: any shape.
    kind: 'exact' (by the error function; DINOv2), 'tanh' (its usual
      approximation; SigLIP, big_vision) or 'quick' (x * sigmoid(1.702 x);
      CLIP).
  """
  if kind == "quick":
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=kind == "tanh")


def norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
  """LayerNorm with statistics in float32 whatever the compute dtype.

  The variance is that of the centred values: E[x^2] - E[x]^2 loses its digits
  in the few channels where CLIP and DINOv2 have activations in the hundreds.
  """
  return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


def project(
  pooled: Float[Array, "b d"],
  features: int | None,
  *,
  bias: bool = False,
) -> Float[Array, "b e"]:
  """The calling module's `projection` of its pooled vectors, if it has one.

  In float32: it is one small product, and the embeddings go on to be divided
  by a temperature.
  """
  pooled = pooled.astype(jnp.float32)
  if features is None:
    return pooled
  return nn.Dense(features, use_bias=bias, name="projection")(pooled)


def _linear(x, kernel, bias):
  y = x @ kernel
  return y if bias is None else y + bias


@jax.custom_vjp
def linear(
  x: Float[Array, "*b d"],
  kernel: Float[Array, "d e"],
  bias: Float[Array, " e"] | None = None,
) -> Float[Array, "*b e"]:
  """x kernel + bias, with gradients that are fast on a CPU too.

  XLA for CPUs multiplies arrays of three dimensions the slower way, after
  copying one of them, and sums a bias's gradient one number at a time, in three
  times the time of a product with a row of ones. It has no forward mode.

  Args:
    x: rows of `d` channels.
    kernel: the weights.
    bias: None for none.
  """
  return _linear(x, kernel, bias)


def _linear_forward(x, kernel, bias):
  return _linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(saved, cotangent):
  def on_cpu(x, kernel, bias, cotangent):
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    if bias is not None:
      bias = (jnp.ones((1, len(rows)), rows.dtype) @ rows)[0]
    return (
      (rows @ kernel.T).reshape(x.shape),
      x.reshape(-1, x.shape[-1]).T @ rows,
      bias,
    )

  def elsewhere(x, kernel, bias, cotangent):
    return jax.vjp(_linear, x, kernel, bias)[1](cotangent)

  return jax.lax.platform_dependent(
    *saved, cotangent, cpu=on_cpu, default=elsewhere
  )


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
  """Flax's layer, by `linear`; kernels start Xavier-uniform by default."""

  features: int
  kernel_init: Callable = kernel_init
  bias_init: Callable = nn.initializers.zeros
  dtype: Any = jnp.float32
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    shape = (x.shape[-1], self.features)
    arrays = [x, self.param("kernel", self.kernel_init, shape)]
    if self.use_bias:
      arrays.append(self.param("bias", self.bias_init, (self.features,)))
    return linear(*(a.astype(self.dtype) for a in arrays))


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection.

  The columns of `qkv` are ordered (head, q|k|v, dim), so that splitting them
  over devices splits whole heads and adds no communication.
  """

  heads: int
  causal: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    b, n, d = x.shape
    qkv = Dense(3 * d, fused_init, dtype=self.dtype, name="qkv")(x)
    qkv = qkv.reshape(b, n, self.heads, 3, d // self.heads)
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    y = attention_lib.attend(q, k, v, causal=self.causal)
    out = Dense(d, dtype=self.dtype, name="out")
    return out(y.reshape(b, n, d))


class Mlp(nn.Module):
  """Two layers with GELU between, or SwiGLU (Shazeer 2020).

  SwiGLU is fc2(silu(gate(x)) * fc1(x)), with the two halves as kernels of their
  own: split over devices, each keeps its hidden units in place.
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
  """A pre-norm transformer block, with layer scale if asked for.

  x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x)); layer scale
  is that of CaiT (Touvron et al. 2021).
  """

  heads: int
  mlp_dim: int
  causal: bool = False
  gelu: str = "tanh"
  mlp: str = "plain"
  layer_scale: float | None = None
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    def scaled(y, name):
      if self.layer_scale is None:
        return y
      init = nn.initializers.constant(self.layer_scale)
      scale = self.param(name, init, (x.shape[-1],))
      return y * scale.astype(y.dtype)

    attention = Attention(self.heads, self.causal, self.dtype, name="attention")
    mlp = Mlp(self.mlp_dim, self.gelu, self.mlp, self.dtype, name="mlp")
    y = norm(self.norm_eps, self.dtype, "norm1")(x)
    x = x + scaled(attention(y), "scale1")
    y = norm(self.norm_eps, self.dtype, "norm2")(x)
    return x + scaled(mlp(y), "scale2")


def stacked_init(block: nn.Module, depth: int, width: int) -> Callable:
  """An initialiser, key -> the parameters of `depth` blocks in one tree.

  Args:
    block: a detached module (`parent=None`) from [b, n, width] to the same.
    depth: how many; every leaf gets this leading dimension.
    width: channels of the block's input.
  """

  def one(key):
    return block.init(key, jnp.zeros((1, 1, width)))["params"]

  return lambda key: jax.vmap(one)(jax.random.split(key, depth))


def run_stack(
  block: nn.Module,
  stack: Mapping[str, Any],
  x: Float[Array, "b n d"],
  *,
  taps: Sequence[int] = (),
  remat: str = "none",
  scan: bool = True,
  mesh: Mesh | None = None,
) -> tuple[Float[Array, "b n d"], dict[int, Float[Array, "b n d"]]]:
  """Runs a stack of blocks.

  Args:
    block: the detached module that `stacked_init` took.
    stack: its stacked parameters.
    x: the first block's input, in the block's compute dtype.
    taps: layers whose output is wanted; 0 is the first block's. The scan runs
      over static slices of the stack that end at these layers, so that a tap
      costs only the array it returns.
    remat: a name of `REMAT`: what the backward pass finds saved. 'none'
      everything, 'full' only each block's input, 'dots' the matrix products,
      'dots_no_batch' those with weights (attention is recomputed).
    scan: False unrolls the blocks, to count FLOPs or to let the compiler
      schedule across them. The values are the same.
    mesh: that rows and parameters are split over: rows then stay where they
      are, and each block's parameters are gathered over `fsdp` where it runs,
      and again in the backward pass. Left to itself the compiler may find a
      whole axis of the batch better spent on splitting channels.

  Returns:
    The last block's output, and {layer: output} for the taps.

  Raises:
    ValueError: for a tap that is no layer, or an unknown remat policy.
  """
  depth = jax.tree.leaves(stack)[0].shape[0]
  check_taps(taps, depth)
  check_remat(remat)

  def step(x, layer):
    x = constrain_batch(x, mesh)
    layer = all_gather_params(layer, mesh, dtype=block.dtype)
    return block.apply({"params": layer}, x), None

  policy = REMAT[remat]
  if policy is None and mesh is not None and mesh.shape["fsdp"] > 1:
    policy = _all_but_gathered
  if policy is not None:
    # Within a scan the loop itself keeps XLA from merging the recomputation
    # with the forward pass; elsewhere that needs a barrier.
    step = jax.checkpoint(step, policy=policy, prevent_cse=not scan)

  tapped = {}
  start = 0
  for end in sorted({*taps, depth - 1}):
    piece = jax.tree.map(lambda p, a=start, b=end + 1: p[a:b], stack)
    if scan:
      x, _ = jax.lax.scan(step, x, piece)
    else:
      for i in range(end + 1 - start):
        x, _ = step(x, jax.tree.map(lambda p, i=i: p[i], piece))
    if end in taps:
      tapped[end] = x
    start = end + 1
  return x, tapped


def _all_but_gathered(primitive, *_, **__) -> bool:
  """Saves what would be saved anyway, but no parameter that was gathered."""
  return primitive.name != "sharding_constraint"


def check_taps(taps: Sequence[int], depth: int) -> None:
  """Raises ValueError unless every tap is a layer, 0 .. depth - 1."""
  bad = [i for i in taps if not 0 <= i < depth]
  if bad:
    raise ValueError(
      f"taps {bad} are no layers of a tower of depth {depth}: layers are "
      f"numbered 0 (output of the first block) to {depth - 1}."
    )


def check_remat(remat: str) -> None:
  """Raises ValueError for an unknown remat policy."""
  if remat not in REMAT:
    raise ValueError(
      f"Unknown remat policy '{remat}'. {did_you_mean(remat, REMAT)}"
    )


def check_tower(spec: Any) -> None:
  """Checks the fields that both towers' specifications have.

  Raises:
    ValueError: for a size below one, a width that the heads do not divide, or
      an unknown GELU.
  """
  name = type(spec).__name__
  for field in ("width", "depth", "heads", "mlp_dim"):
    if getattr(spec, field) < 1:
      raise ValueError(
        f"{name}.{field} is {getattr(spec, field)}; it must be at least 1."
      )
  if spec.width % spec.heads:
    raise ValueError(
      f"{name}.width {spec.width} is not divisible by its {spec.heads} heads. "
      f"Choose heads that divide it, or a multiple of {spec.heads} as width."
    )
  check_choice(f"{name}.gelu", spec.gelu, ("tanh", "exact", "quick"))
