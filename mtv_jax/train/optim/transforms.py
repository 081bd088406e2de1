"""Optimizers: optax transformations from gradients to updates.

A new optimizer is an `UpdateRule` in `OPTIMIZERS`, or in a user's module, which
`config.optim.name="MODULE:NAME"` names. Its fields are its options.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from mtv_jax.config.options import Fraction, NonNegativeFloat, PositiveInt
from mtv_jax.train.optim.schedules import Schedule
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import map_with_names

Transform = optax.GradientTransformation
MomentDtype = Literal["float32", "bfloat16"]
# Heads of each stack of blocks, see `StepSpec.attention_heads`.
HeadCounts = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class UpdateRule:
  """Base class of optimizers, which are frozen dataclasses."""

  # A method (state of `wrap`'s result, parameters) -> parameters to evaluate,
  # if these are not the parameters that are trained, as in Schedule-Free.
  # Parameters that rules freeze are left out of both. The run stores the result
  # as its weights `ema`, which evaluations and exports then use.
  eval_params: ClassVar[Callable[..., Any] | None] = None

  def scale(self, attention_heads: HeadCounts) -> Transform:
    """Maps gradients to updates, before learning rate and weight decay."""
    raise NotImplementedError

  def mup_rate(
    self, name: str, shape: Sequence[int], base: Sequence[int]
  ) -> float:
    """muP's learning-rate multiplier of a parameter, from its base shape."""
    raise ConfigError(
      f"config.model.mup has no learning rates for {type(self).__name__}: set"
      " config.optim.name to 'adamw' or 'muon', or leave mup out."
    )

  def wrap(self, tx: Transform, schedule: Schedule) -> Transform:
    """Wraps the whole transformation: clipping, `scale`, rate and decay.

    The result is a `GradientTransformationExtraArgs` that passes its extra
    arguments on to `tx`. Its state has arrays with the parameters' names and
    shapes, or small arrays.
    """
    del schedule
    return tx

  def describe(self, names: Sequence[str]) -> str:
    """A line for the log about the trained parameters `names`."""
    del names
    return ""


@dataclasses.dataclass(frozen=True)
class AdamW(UpdateRule):
  """Adam (Kingma and Ba 2015) with decoupled decay (Loshchilov et al. 2019)."""

  b1: Fraction = 0.9
  b2: Fraction = 0.999
  eps: NonNegativeFloat = 1e-8
  mu_dtype: MomentDtype = "float32"

  def scale(self, attention_heads: HeadCounts) -> Transform:
    return optax.scale_by_adam(
      self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype
    )

  def mup_rate(self, name, shape, base) -> float:
    """1 / m for kernels of fan-in m times the base model's."""
    return base[-2] / shape[-2] if name.endswith("/kernel") else 1.0


@dataclasses.dataclass(frozen=True)
class Lion(UpdateRule):
  """Lion (Chen et al. 2023)."""

  b1: Fraction = 0.9
  b2: Fraction = 0.99
  mu_dtype: MomentDtype = "float32"

  def scale(self, attention_heads: HeadCounts) -> Transform:
    return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Adafactor(UpdateRule):
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

  def scale(self, attention_heads: HeadCounts) -> Transform:

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
class SGD(UpdateRule):
  """SGD, with optional momentum."""

  momentum: Fraction = 0.0
  mu_dtype: MomentDtype = "float32"

  def scale(self, attention_heads: HeadCounts) -> Transform:
    if not self.momentum:
      return optax.identity()
    return optax.trace(self.momentum, accumulator_dtype=self.mu_dtype)


# Match the names of parameters, and of moments, which have a prefix.
_MATRIX = re.compile(r"(image|text|heads/[^/]+(?:/decoder)?)/blocks/.*kernel$")
_QKV = re.compile(r"(image|text|heads/[^/]+)/blocks/attention/(qkv)/kernel$")
_FUSED = re.compile(
  r"(image|text|heads/[^/]+)/blocks/(?:cross_)?attention/(q?kv)/kernel$"
)


@dataclasses.dataclass(frozen=True)
class Muon(UpdateRule):
  """Muon (Jordan et al. 2024): momentum orthogonalised by Newton-Schulz.

  For block kernels. AdamW updates biases, norms, embeddings and other kernels
  of heads, which don't map hidden states to hidden states. Nesterov momentum is
  optax's, with Adam's bias corrections, which Jordan's code lacks.
  """

  momentum: Fraction = 0.95
  nesterov: bool = True
  # Whether the fused key and value of a caption decoder's attention are two
  # matrices, like query, key and value of self-attention.
  split_kv: bool = False
  ns_steps: PositiveInt = 5  # Newton-Schulz iterations.
  # RMS of Muon's updates. 0.2 matches AdamW, so that both share a learning rate
  # and a weight decay (Liu et al. 2025, Muon is scalable for LLM training,
  # arXiv 2502.16982).
  rms: NonNegativeFloat = 0.2
  b1: Fraction = 0.9  # AdamW's, like b2 and eps.
  b2: Fraction = 0.999
  eps: NonNegativeFloat = 1e-8
  mu_dtype: MomentDtype = "float32"

  def scale(self, attention_heads: HeadCounts) -> Transform:
    muon = optax.chain(
      optax.contrib.scale_by_muon(
        beta=self.momentum,
        nesterov=self.nesterov,
        ns_steps=self.ns_steps,
        mu_dtype=self.mu_dtype,
        weight_dimension_numbers=_dimension_numbers,
      ),
      optax.stateless(lambda updates, _: self._scale_to_rms(updates)),
    )
    adamw = optax.scale_by_adam(
      self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype
    )
    pattern = _FUSED if self.split_kv else _QKV
    muon = _split_fused(muon, pattern, attention_heads)
    return optax.partition({"muon": muon, "adamw": adamw}, _choose_labels)

  def describe(self, names: Sequence[str]) -> str:
    """Lists the trained parameters that Muon updates, for the log."""
    muon_names = [name for name in names if _MATRIX.search(name)]
    note = (
      f"Muon updates {len(muon_names)} of {len(names)} parameters"
      f" ({', '.join(muon_names) or 'none'}), AdamW the rest."
    )
    is_fused = any("cross_attention/kv/" in name for name in muon_names)
    if is_fused and not self.split_kv:
      note += (
        " Key and value of cross-attention are one matrix;"
        " optim.split_kv=True separates them."
      )
    return note

  def mup_rate(self, name, shape, base) -> float:
    """AdamW's, or the rate that scales an update's spectral norm as in muP.

    The norm has to scale as sqrt(n / m) for kernels `[m, n]` (Yang, Simon and
    Bernstein 2023, arXiv 2310.17813); `_scale_to_rms` yields sqrt(max(m, n)).
    """
    if not _MATRIX.search(name):
      return AdamW().mup_rate(name, shape, base)
    match = _FUSED.search(name)
    parts = len(match[2]) if match else 1

    def rate(m, n):
      return (n / m / max(m, n / parts)) ** 0.5

    return rate(*shape[-2:]) / rate(*base[-2:])

  def _scale_to_rms(self, updates: Any) -> Any:
    """Scales orthogonal `[m, n]`, whose RMS is max(m, n)^(-1/2), to `rms`."""

    def scale(name, update):
      del name
      m, n = update.shape[1:3]
      if update.ndim == 5:  # [depth, D, heads, 3, dim]
        n *= update.shape[4]
      return self.rms * max(m, n) ** 0.5 * update

    return map_with_names(scale, updates)


def _choose_labels(params: Any) -> Any:
  return map_with_names(
    lambda name, _: "muon" if _MATRIX.search(name) else "adamw", params
  )


def _dimension_numbers(updates: Any) -> Any:
  """The matrix axes; `scale_by_muon` maps over the remaining axes.

  A stacked kernel is `[depth, in, out]`: one matrix per block. Each projection
  of the fused QKV is orthogonalised separately; `[D, 3 D]` would couple them.
  """

  def numbers(name, update):
    del name
    if update.ndim == 5:  # [depth, D, heads, 3, dim]
      return MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 4))
    return MuonDimensionNumbers(reduction_axis=1, output_axis=2)

  return map_with_names(numbers, updates)


def _split_fused(
  inner: Transform, pattern: re.Pattern, attention_heads: HeadCounts
) -> Transform:
  """Runs `inner` on fused kernels `[depth, D, heads, 3 (qkv) or 2 (kv), dim]`.

  Its state has the parameters' shapes, so it is sharded and saved like them.
  """

  def split(name, leaf):
    if not (match := pattern.search(name)):
      return leaf
    shape = attention_heads[match[1]], len(match[2])
    return leaf.reshape(*leaf.shape[:2], *shape, -1)

  def merge(name, leaf):
    return leaf.reshape(*leaf.shape[:2], -1) if pattern.search(name) else leaf

  def init(params):
    return map_with_names(merge, inner.init(map_with_names(split, params)))

  def update(updates, state, params=None):
    del params  # Not read by Muon or AdamW.
    updates, state = inner.update(
      map_with_names(split, updates), map_with_names(split, state)
    )
    return map_with_names(merge, updates), map_with_names(merge, state)

  return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, type[UpdateRule]] = {
  "adamw": AdamW,
  "adafactor": Adafactor,
  "lion": Lion,
  "sgd": SGD,
  "muon": Muon,
}
