"""Muon (Jordan et al. 2024): momentum orthogonalised by Newton-Schulz.

Muon updates the kernels of transformer blocks. AdamW updates biases, norms,
embeddings and heads, which don't map hidden states to hidden states.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optax
from optax.contrib import MuonDimensionNumbers

from mtv_jax.config.options import Fraction, NonNegativeFloat, PositiveInt
from mtv_jax.utils.tree import map_with_names

# Match parameter names, also with a prefix (their moments).
_MATRIX = re.compile(r"(image|text|heads/[^/]+)/blocks/.*kernel$")
_QKV = re.compile(r"(image|text|heads/[^/]+)/blocks/attention/qkv/kernel$")


@dataclasses.dataclass(frozen=True)
class Muon:
  """Muon for block kernels, AdamW for the remaining parameters."""

  momentum: Fraction = 0.95
  nesterov: bool = True
  ns_steps: PositiveInt = 5  # Newton-Schulz iterations.
  # RMS of Muon's updates. 0.2 matches AdamW, so that both share a learning rate
  # and a weight decay (Liu et al. 2025, Muon is scalable for LLM training,
  # arXiv 2502.16982).
  rms: NonNegativeFloat = 0.2
  b1: Fraction = 0.9  # AdamW's, like b2 and eps.
  b2: Fraction = 0.999
  eps: NonNegativeFloat = 1e-8
  mu_dtype: Literal["float32", "bfloat16"] = "float32"

  def scale(
    self, attention_heads: Mapping[str, int]
  ) -> optax.GradientTransformation:
    """As `AdamW.scale` in `transforms`."""
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
    return optax.partition(
      {"muon": _split_qkv(muon, attention_heads), "adamw": adamw}, _labels
    )

  def describe(self, names: Sequence[str]) -> str:
    """Lists the trained parameters that Muon updates, for the log."""
    taken = [name for name in names if _MATRIX.search(name)]
    return (
      f"Muon takes {len(taken)} of {len(names)} parameters, AdamW the others:"
      f" {', '.join(taken) or 'none'}."
    )

  def _scale_to_rms(self, updates: Any) -> Any:
    """Orthogonal matrices `[m, n]` have an RMS of 1 / sqrt(max(m, n))."""

    def scale(name, update):
      m, n = update.shape[1:3]
      if _QKV.search(name):  # [depth, D, heads, 3, dim]
        n *= update.shape[4]
      return self.rms * max(m, n) ** 0.5 * update

    return map_with_names(scale, updates)


def _labels(params: Any) -> Any:
  return map_with_names(
    lambda name, _: "muon" if _MATRIX.search(name) else "adamw", params
  )


def _dimension_numbers(updates: Any) -> Any:
  """The matrix axes; `scale_by_muon` maps over the remaining axes.

  A stacked kernel is `[depth, in, out]`: one matrix per block. Each projection
  of the fused QKV is orthogonalised separately; `[D, 3 D]` would couple them.
  """

  def numbers(name, update):
    if _QKV.search(name):  # [depth, D, heads, 3, dim]
      return MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 4))
    return MuonDimensionNumbers(reduction_axis=1, output_axis=2)

  return map_with_names(numbers, updates)


def _split_qkv(
  inner: optax.GradientTransformation, attention_heads: Mapping[str, int]
) -> optax.GradientTransformation:
  """Runs `inner` on QKV kernels `[depth, D, heads, 3, dim]`.

  Its state has the parameters' shapes, so it is sharded and saved like them.
  """

  def split(name, leaf):
    match = _QKV.search(name)
    if not match:
      return leaf
    heads = attention_heads[match[1]]
    return leaf.reshape(*leaf.shape[:2], heads, 3, -1)

  def merge(name, leaf):
    return leaf.reshape(*leaf.shape[:2], -1) if _QKV.search(name) else leaf

  def init(params):
    return map_with_names(merge, inner.init(map_with_names(split, params)))

  def update(updates, state, params=None):
    del params  # Not read by Muon or AdamW.
    updates, state = inner.update(
      map_with_names(split, updates), map_with_names(split, state)
    )
    return map_with_names(merge, updates), map_with_names(merge, state)

  return optax.GradientTransformation(init, update)
