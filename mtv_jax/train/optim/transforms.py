"""Optimizers: optax transformations from gradients to updates.

A new optimizer is a class in `OPTIMIZERS`; its fields are its options.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

from mtv_jax.config.options import Fraction, NonNegativeFloat
from mtv_jax.train.optim.muon import Muon
from mtv_jax.utils.tree import map_with_names

MomentDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam (Kingma and Ba 2015) with decoupled decay (Loshchilov et al. 2019)."""

  b1: Fraction = 0.9
  b2: Fraction = 0.999
  eps: NonNegativeFloat = 1e-8
  mu_dtype: MomentDtype = "float32"

  def scale(
    self, attention_heads: Mapping[str, int]
  ) -> optax.GradientTransformation:
    """Maps gradients to updates, before learning rate and weight decay.

    `attention_heads`: see `StepSpec.attention_heads`.
    """
    return optax.scale_by_adam(
      self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype
    )


@dataclasses.dataclass(frozen=True)
class Lion:
  """Lion (Chen et al. 2023)."""

  b1: Fraction = 0.9
  b2: Fraction = 0.99
  mu_dtype: MomentDtype = "float32"

  def scale(
    self, attention_heads: Mapping[str, int]
  ) -> optax.GradientTransformation:
    """As `AdamW.scale`."""
    return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Adafactor:
  """Adafactor as modified for ViTs (Zhai et al. 2022, arXiv 2106.04560, 3.4).

  Does not scale by the parameter's RMS, allows half-precision momentum, and
  caps the decay of the second moment.
  """

  b1: Fraction = 0.9  # Momentum; 0 disables it.
  b2: Fraction = 0.999  # Maximum decay of the second moment.
  mu_dtype: MomentDtype = "float32"
  # Clips the RMS of the update per parameter, or per layer of stacked blocks,
  # as if their parameters were not stacked.
  clip_rms_by: Literal["parameter", "layer"] = "parameter"

  def scale(
    self, attention_heads: Mapping[str, int]
  ) -> optax.GradientTransformation:
    """As `AdamW.scale`."""

    def decay_rate(step: Any, exponent: Any) -> Any:
      return jnp.minimum(self.b2, 1.0 - (step + 1.0) ** -exponent)

    ema = optax.ema(self.b1, debias=False, accumulator_dtype=self.mu_dtype)
    by_layer = optax.stateless(
      lambda updates, _: map_with_names(_clip_layer_rms, updates)
    )
    return optax.chain(
      optax.scale_by_factored_rms(decay_rate_fn=decay_rate),
      by_layer if self.clip_rms_by == "layer" else optax.clip_by_block_rms(1.0),
      *([ema] if self.b1 else []),
    )


def _clip_layer_rms(name: str, update: Any) -> Any:
  """Clips the RMS to 1, separately for each layer of stacked blocks."""
  axes = range(1 if "/blocks/" in name else 0, update.ndim)
  squares = jnp.mean(jnp.square(update), axis=tuple(axes), keepdims=True)
  return update / jnp.maximum(jnp.sqrt(squares), 1.0)


@dataclasses.dataclass(frozen=True)
class SGD:
  """SGD, with optional momentum."""

  momentum: Fraction = 0.0
  mu_dtype: MomentDtype = "float32"

  def scale(
    self, attention_heads: Mapping[str, int]
  ) -> optax.GradientTransformation:
    """As `AdamW.scale`."""
    if not self.momentum:
      return optax.identity()
    return optax.trace(self.momentum, accumulator_dtype=self.mu_dtype)


OPTIMIZERS: dict[str, Any] = {
  "adamw": AdamW,
  "adafactor": Adafactor,
  "lion": Lion,
  "sgd": SGD,
  "muon": Muon,
}
