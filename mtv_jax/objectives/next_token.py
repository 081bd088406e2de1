"""Next-token loss of conversations about images: LLaVA (Liu et al. 2023).

    L = -(1/n) sum log softmax_v(logits)[token],  over the n tokens of answers

A connector maps the encoder's patches to embeddings, which replace the image
token of a conversation in the language model, see `heads/language_model.py`.
Questions and the template are excluded from the loss. Rules over parameter
names freeze the encoder and, in LLaVA's first stage, the language model.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.models.heads.language_model import LanguageHead
from mtv_jax.models.remat import build_policy
from mtv_jax.objectives import base
from mtv_jax.objectives.token_loss import cross_entropies
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class LossInputs:
  """Sums over the answers' tokens of each example."""

  loss: Float[Array, " b"]
  correct: Float[Array, " b"]  # Number of argmax predictions.
  count: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class NextToken(base.Objective):
  """Trains a connector and a language model on conversations about images."""

  # Connector and language model; their options share the config entry.
  head: LanguageHead = LanguageHead()
  view: str = "image"  # The view to read; only its first crop is used.
  # Vocabulary columns to compute at a time, to bound memory; None for all.
  chunk: options.PositiveInt | None = 8192
  remat: str = "none"  # One choice of `models.remat`; not 'auto'.
  scan: bool = True

  def __post_init__(self):
    build_policy(self.remat, where="NextToken.remat")

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> NextToken:
    base.check_visible("next_token", self.view, views)
    return dataclasses.replace(self, head=self.head.resolve(spec))

  def needs(self) -> base.Needs:
    return base.Needs(
      encodings={self.image: self.head.taps},
      fields=("conversation", "conversation_answer"),
    )

  def heads(self) -> dict[str, base.Head]:
    module = self.head.module(remat=self.remat, scan=self.scan)
    return {self.head.params_key: base.Head(module, self.head.example)}

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    image, tokens = encodings[self.image], batch["conversation"]
    patches = self.head.select_features(image)[:, 0]  # [b, N, D]
    logits = heads[self.head.params_key](tokens, patches)
    losses, correct = cross_entropies(
      logits, tokens[:, None, 1:], chunk=self.chunk
    )
    weights = batch["conversation_answer"][:, None, 1:].astype(jnp.float32)
    sums = (jnp.where(weights, x, 0.0).sum((1, 2)) for x in (losses, correct))
    return LossInputs(*sums, count=weights.sum((1, 2)))

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    count = loss_inputs.count.sum()
    means = {
      name: base.WeightedMean(getattr(loss_inputs, name).sum(), count)
      for name in ("loss", "correct")
    }
    report = {"accuracy": means["correct"]}
    return base.Terms(loss=means["loss"], report=report)
