"""muP: initial values and learning rates that transfer over width and depth.

Relative to a base model, with m = n / n0 for the fan-in n of a kernel, M = L /
L0 for the depth L of a tower, and its depth exponent a (1 in CompleteP, Dey et
al. 2025, arXiv 2505.01618, table 1; 1/2 in depth-muP, Yang et al. 2023, arXiv
2310.02244). For Adam (Yang et al. 2021, arXiv 2203.03466, table 8):

  parameter                               initial values    learning rate
  kernel of growing fan-in and fan-out    m^-1/2            1 / m
  kernel of growing fan-in only           1 / m             1 / m
  other kernels, biases, norms, tokens    1                 1
  all of these in a tower's blocks                          times M^(a-1)

Forward multipliers are M^-a on the residual branches of a tower, sqrt(d0 / d)
on queries of d channels, so that logits scale as 1/d, and sqrt(D0 / D) on token
embeddings that `token_scale` multiplies by sqrt(D).

The update of Adam and Muon does not depend on the scale of the gradient, so a
forward multiplier equals the same factor on a parameter's initial value and on
its learning rate (lemma J.1 of arXiv 2203.03466, without Adam's epsilon). It is
folded into the parameters in this way from the first step on: towers run
the same code as without muP, and checkpoints and exports hold plain weights.
The factors leave the weight decay of a step at lr(t) * weight_decay(t) * p.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jaxtyping import PyTree

from mtv_jax.utils.tree import flatten_with_names, map_with_names

_BLOCKS = re.compile(r"^(image|text)/blocks/")
_BRANCH = re.compile(r"^(image|text)/blocks/(attention/out|mlp/fc2)/")
_QUERIES = re.compile(
  r"^(image/pool|image|text|heads/[^/]+)/(?:.*/)?(?:cross_)?attention/(qkv|q)/"
)
_PROBE = "image/pool/probe"


@dataclasses.dataclass(frozen=True)
class Multiplier:
  """Factors of one parameter relative to the base model.

  Attributes:
    init: factor of the initial values, besides the base's standard deviation.
    rate: factor of the learning rate, besides `UpdateRule.mup_rate`.
    base_shape: the parameter's shape in the base model.
  """

  init: float | np.ndarray
  rate: float | np.ndarray
  base_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mup:
  """A base model, and what depends on depth.

  Attributes:
    base: `StepSpec` with the base widths and the model's own depths.
    depths: ratio to the base depth, and depth exponent, by tower.
  """

  base: Any
  depths: Mapping[str, tuple[float, float]]

  def multipliers(
    self, spec: Any, shapes: PyTree, base_shapes: PyTree
  ) -> dict[str, Multiplier]:
    """The multipliers of a `StepSpec` by parameter name."""
    base = {name: tuple(x.shape) for name, x in flatten_with_names(base_shapes)}
    counts, base_counts = _count_heads(spec), _count_heads(self.base)
    multipliers = {}
    for name, leaf in flatten_with_names(shapes):
      shape, rate = tuple(leaf.shape), 1.0
      factor = self._scale_queries(name, shape, base[name], counts, base_counts)
      if match := _BLOCKS.match(name):
        ratio, exponent = self.depths.get(match[1], (1.0, 1.0))
        rate = ratio ** (exponent - 1)
        factor = factor * (ratio**-exponent if _BRANCH.match(name) else 1.0)
      if name == "text/token_embedding" and spec.model.text.token_scale:
        factor = (base[name][-1] / shape[-1]) ** 0.5
      init = factor
      if name.endswith("/kernel"):
        widens = shape[-1] != base[name][-1]
        init = init * (base[name][-2] / shape[-2]) ** (0.5 if widens else 1.0)
      multipliers[name] = Multiplier(init, rate * factor, base[name])
    return multipliers

  def _scale_queries(self, name, shape, base, counts, base_counts):
    """sqrt(d0 / d) for queries of d channels per head, else 1."""
    match = _QUERIES.match(name)
    if name == _PROBE and self.base.model.image.pool == "query":
      match = ("", "image/pool", "q")
    if not match or match[1] not in counts:
      return 1.0
    parts, heads = len(match[2]), counts[match[1]]
    channels = shape[-1] // (parts * heads)
    base_channels = base[-1] // (parts * base_counts[match[1]])
    factor = (base_channels / channels) ** 0.5
    if parts == 1:
      return factor
    columns = np.ones((heads, parts, channels), np.float32)
    columns[:, 0] = factor
    return columns.reshape(-1)


def _count_heads(spec: Any) -> dict[str, int]:
  """Attention heads by parameter-name prefix."""
  image = spec.model.image
  pool = {"image/pool": image.pool_heads or image.heads}
  return {**spec.attention_heads, **pool}


def _quantile_bits(key: jax.Array, width: int, shape: tuple) -> jax.Array:
  bits = jnp.uint64 if width == 64 else jnp.uint32
  return jnp.full(shape, key[0] >> (32 - min(width, 32)), bits)


# Keys with which every draw is the upper quartile of its distribution. Two
# initialisers of one family, such as normal, then differ by the ratio of their
# scales.
_QUANTILES = define_prng_impl(
  key_shape=(1,),
  seed=lambda seed: jnp.full((1,), 0xC0000000, jnp.uint32),
  split=lambda key, shape: jnp.broadcast_to(key, (*shape, 1)),
  random_bits=_quantile_bits,
  fold_in=lambda key, data: key,
  name="quantile",
  tag="quantile",
)


def scale_init(
  params: PyTree,
  multipliers: Mapping[str, Multiplier],
  init: Callable[[jax.Array], PyTree],
  base_init: Callable[[jax.Array], PyTree],
) -> PyTree:
  """Scales initial parameters to muP's standard deviations.

  `init` and `base_init` initialise the model and its base model from a key.
  """
  # The barrier prevents XLA from folding constants of the parameters' sizes.
  data = jax.lax.optimization_barrier(jnp.full((1,), 0xC0000000, jnp.uint32))
  key = jax.random.wrap_key_data(data, impl=_QUANTILES)
  model_scales, base_scales = (
    {name: jnp.abs(x).max() for name, x in flatten_with_names(f(key))}
    for f in (init, base_init)
  )

  def scale(name, x):
    ratio = jnp.where(
      model_scales[name] > 0, base_scales[name] / model_scales[name], 1.0
    )
    return (x * (ratio * multipliers[name].init)).astype(x.dtype)

  return map_with_names(scale, params)
