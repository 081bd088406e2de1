"""Self-attention of the towers, with a kernel for each accelerator.

`config.model.attention` is one of `CHOICES`. A kernel runs on its platform; any
other platform falls back to XLA, so that a config trains, resumes and evaluates
anywhere. All choices compute softmax(q k^T / sqrt(d)) v, with a float32
softmax, and its gradient.

- `auto`: cuDNN on GPUs if it supports the dtype and the heads, else `xla`.
- `xla`: the plain formula; long sequences in blocks of queries.
- `cudnn`: cuDNN flash attention, in bfloat16 or float16.
- `splash`: Pallas splash attention on TPUs, from `SPLASH_LENGTH` tokens on.

The float32 logits of 3601 tokens would take 0.6 GB per layer and image. Blocks
of queries see all keys at once, so they need no online softmax. The backward
pass recomputes each block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from mtv_jax.parallel.mesh import MESH_AXES
from mtv_jax.parallel.rules import partition_spec
from mtv_jax.utils.errors import InputError, check_choice

Heads = Float[Array, "b n h d"]
# k divides h: grouped-query attention.
KeyHeads = Float[Array, "b n k d"]
Valid = Bool[Array, "b n"] | None
CHOICES = ("auto", "xla", "cudnn", "splash")
PLAIN = "plain"  # Internal, to count FLOPs: see `plain_attention`.
# Checkpoint name (see `remat.NAMES`) of outputs and of splash's residuals.
_CHECKPOINT_NAME = "attention"

# Sequence lengths from which attention runs in blocks of queries. A CPU
# benefits at short lengths: a block's logits stay in its cache.
CPU_BLOCKWISE_LENGTH = 512
BLOCKWISE_LENGTH = 2048
CPU_BLOCK = 64  # Queries per block.
BLOCK = 512
# All block sizes are multiples of this, which fits CPU lanes and TPU tiles.
BLOCK_MULTIPLE = 16

# Splash attention.
SPLASH_LENGTH = 128  # Minimum; shorter sequences are mostly padding.
SPLASH_UNIT = 128  # Block sizes are multiples of this.
SPLASH_BLOCK = 512  # Maximum block size.
# Matrix products (n x n x d) per kernel. Forward: logits, outputs. Backward:
# logits again, and the gradients of weights, values, keys and queries.
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 5}
SPLASH_PLATFORMS = ("tpu",)  # Elsewhere, tests interpret the kernel, slowly.


def build_attention(
  choice: str = "auto", mesh: Mesh | None = None
) -> Callable[..., Array]:
  """Returns an implementation of attention: f(q, k, v, causal=, valid=).

  `mesh` shards examples and heads; its platform selects the kernel. None: the
  default devices.
  """
  if choice == PLAIN:
    return plain_attention
  if choice not in CHOICES:
    check_choice("config.model.attention", choice, CHOICES)
  device = (jax.devices() if mesh is None else mesh.devices.flat)[0]
  if choice == "splash" and device.platform in SPLASH_PLATFORMS:
    interpret = device.platform != "tpu"
    return functools.partial(splash_attention, mesh=mesh, interpret=interpret)
  if choice in ("auto", "cudnn") and device.platform == "gpu":
    strict = choice == "cudnn"
    return functools.partial(_gpu_attention, device=device, strict=strict)
  return attention


def attention(
  q: Heads,
  k: KeyHeads,
  v: KeyHeads,
  *,
  causal: bool = False,
  valid: Valid = None,
) -> Heads:
  """softmax(q k^T / sqrt(d)) v compiled by XLA, with a float32 softmax.

  `causal`: a token attends to itself and earlier tokens. `valid`: tokens to
  attend to. Both options always use `jax.nn.dot_product_attention`.
  """
  n = q.shape[1]
  if causal or valid is not None or n < CPU_BLOCKWISE_LENGTH:
    return plain_attention(q, k, v, causal=causal, valid=valid)
  default = jax.nn.dot_product_attention
  if n >= BLOCKWISE_LENGTH:
    default = blockwise_attention
  y = jax.lax.platform_dependent(q, k, v, cpu=cpu_attention, default=default)
  return checkpoint_name(y, _CHECKPOINT_NAME)


def plain_attention(
  q: Heads,
  k: KeyHeads,
  v: KeyHeads,
  *,
  causal: bool = False,
  valid: Valid = None,
) -> Heads:
  """`attention` without blocks at any length; nothing is recomputed."""
  mask = None if valid is None else valid[:, None, None, :]
  y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
  return checkpoint_name(y, _CHECKPOINT_NAME)


def _gpu_attention(q, k, v, *, causal=False, valid=None, device, strict):
  """cuDNN flash attention, or `attention` if cuDNN does not support the input.

  `valid` falls back to `attention`: cuDNN would read the mask as a bias
  `[b, h, n, n]`, and differentiate it.
  """
  missing = cudnn_lacks(q, getattr(device, "compute_capability", "0"))
  if missing and strict:
    raise InputError(
      f"config.model.attention='cudnn' needs {missing}. Set 'auto' or 'xla'."
    )
  if missing or valid is not None:
    return attention(q, k, v, causal=causal, valid=valid)
  y = jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation="cudnn"
  )
  return checkpoint_name(y, _CHECKPOINT_NAME)


def cudnn_lacks(q: Any, compute_capability: str) -> str | None:
  """The cuDNN requirement that queries `[b, n, h, d]` or the GPU violate."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"config.model.dtype 'bfloat16', not {q.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"heads with a multiple of 8 channels, up to 128, not {q.shape[-1]}"
  try:
    capability = float(compute_capability)
  except ValueError:  # AMD reports an architecture name.
    return f"an NVIDIA GPU, not {compute_capability}"
  if capability < 8:
    return f"compute capability 8.0, not {compute_capability}"
  return None


def splash_attention(
  q: Heads,
  k: Heads,
  v: Heads,
  *,
  causal: bool = False,
  valid: Valid = None,
  mesh: Mesh | None = None,
  interpret: bool = False,
) -> Heads:
  """Pallas splash attention: online softmax in blocks of queries and keys.

  Sequences are padded to a multiple of `SPLASH_UNIT`; the padding is masked.
  Sequences below `SPLASH_LENGTH` use `attention`. On a mesh each device runs
  the kernel on its rows and heads. `interpret` needs no TPU.
  """
  if q.shape[1] < SPLASH_LENGTH:
    return attention(q, k, v, causal=causal, valid=valid)
  run = functools.partial(_run_splash, causal=causal, interpret=interpret)
  if mesh is None or mesh.size == 1:
    return run(q, k, v, valid)
  axes = partition_spec((MESH_AXES[:2], None, "tensor", None), q.shape, mesh)
  rows = jax.P(axes[0], None)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(axes, axes, axes, None if valid is None else rows),
    out_specs=axes,
    check_vma=False,  # Kernels don't declare the axes their results vary over.
  )(q, k, v, valid)


def _run_splash(q, k, v, valid, *, causal, interpret):
  """Splash attention of one device's rows and heads."""
  # Lazy: importing Pallas takes half a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  b, n, heads, d = q.shape
  length = -(-n // SPLASH_UNIT) * SPLASH_UNIT
  blocks = range(SPLASH_UNIT, SPLASH_BLOCK + 1, SPLASH_UNIT)
  block_size = max(block for block in blocks if length % block == 0)
  mask_cls = splash.CausalMask if causal else splash.FullMask
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask_cls((length, length))] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(
      block_q=block_size,
      block_kv=block_size,
      block_q_dkv=block_size,
      block_kv_dkv=block_size,
      use_fused_bwd_kernel=True,
    ),
    residual_checkpoint_name=_CHECKPOINT_NAME,
    interpret=interpret,
  )
  if valid is not None:
    # Rows without a valid token get uniform weights, as in `attention`.
    has_valid = valid.any(1, keepdims=True)  # [B, 1]
    q = jnp.where(has_valid[..., None, None], q, 0)
    valid |= ~has_valid
  elif length > n:
    valid = jnp.ones((b, n), bool)
  segments = None
  if valid is not None:
    keys = _pad(valid, length).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.ones_like(keys), keys)
  q = (q * d**-0.5).astype(q.dtype)
  q, k, v = (_pad(x, length).swapaxes(1, 2) for x in (q, k, v))  # [B, H, N, d]
  y = jax.vmap(kernel)(q, k, v, segments)
  return y.swapaxes(1, 2)[:, :n]


def kernel_flops(name: str, operands: Sequence[Sequence[int]]) -> float:
  """FLOPs of the products inside a splash kernel; 0 for any other operation.

  Includes blocks that a causal mask skips. `name` is the operation's `op_name`;
  the first operand of rank 4 is the queries' `[b, h, n, d]`.
  """
  for phase, products in _SPLASH_PRODUCTS.items():
    if f"splash_mha_{phase}" in name:
      b, heads, n, d = next(dims for dims in operands if len(dims) == 4)
      return 2.0 * products * b * heads * n * n * d
  return 0.0


def blockwise_attention(q: Heads, k: Heads, v: Heads) -> Heads:
  """Attention in blocks of `BLOCK` queries, all heads at once."""
  attend = _save_only_args(jax.nn.dot_product_attention)
  blocks = jnp.moveaxis(_split_blocks(q, BLOCK), 1, 0)  # [c, b, s, h, d]
  out = jax.lax.map(lambda queries: attend(queries, k, v), blocks)
  return _join_blocks(jnp.moveaxis(out, 0, 1), q.shape[1])


def cpu_attention(q: Heads, k: Heads, v: Heads) -> Heads:
  """Attention in blocks of `CPU_BLOCK` queries of one head, queries last.

  XLA for CPUs vectorises sums and maxima over a leading dimension, not over the
  last one. So the keys, which softmax sums over, come first.
  """
  width = q.shape[-1]

  @_save_only_args
  def attend_block(queries, keys, values):
    logits = jnp.einsum(
      "bnd,bds->bns", keys, queries, preferred_element_type=jnp.float32
    )
    logits *= width**-0.5  # [B, N, block]
    # The maximum only prevents an overflow of exp.
    max_logits = jax.lax.stop_gradient(logits.max(1, keepdims=True))
    weights = jnp.exp(logits - max_logits)
    total = weights.sum(1, keepdims=True)
    out = jnp.einsum(
      "bdn,bns->bds",
      values,
      weights.astype(values.dtype),
      preferred_element_type=jnp.float32,
    )
    return (out / total).astype(values.dtype)

  def attend_head(arrays):
    queries, keys, values = arrays
    return jax.lax.map(lambda x: attend_block(x, keys, values), queries)

  queries = _split_blocks(q, CPU_BLOCK).transpose(3, 1, 0, 4, 2)  # h c b d s
  keys = k.transpose(2, 0, 1, 3)  # h b n d
  values = v.transpose(2, 0, 3, 1)  # h b d n
  out = jax.lax.map(attend_head, (queries, keys, values))
  return _join_blocks(out.transpose(2, 1, 4, 0, 3), q.shape[1])


def _save_only_args(function: Callable[..., Array]) -> Callable[..., Array]:
  """Wraps a function to save only its arguments for the backward pass.

  `jax.checkpoint` is not enough: an outer remat policy that saves matrix
  products would also save the products inside `function`.
  """
  wrapped = jax.custom_vjp(function)
  wrapped.defvjp(
    lambda *args: (function(*args), args),
    lambda args, cotangent: jax.vjp(function, *args)[1](cotangent),
  )
  return wrapped


def _split_blocks(x: Array, block: int) -> Array:
  """Splits [b, n, ...] into [b, count, size, ...], zero-padded."""
  n = x.shape[1]
  count = -(-n // block)
  size = -(-n // (count * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE
  x = _pad(x, count * size)
  return x.reshape(x.shape[0], count, size, *x.shape[2:])


def _join_blocks(x: Array, n: int) -> Array:
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n]


def _pad(x: Array, length: int) -> Array:
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, length - x.shape[1])
  return jnp.pad(x, padding)
