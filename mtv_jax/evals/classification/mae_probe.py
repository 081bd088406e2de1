"""Linear classification of frozen features, as MAE does it.

Batch normalisation without scale and bias, then one linear layer, on one
vector of an image (He et al. 2022, appendix A; MoCo v3's recipe). LARS (You
et al. 2017) without weight decay: with m the momentum,

    m <- 0.9 m + t g,   w <- w - rate m,   t = 0.001 |w| / |g|

and t = 1 for biases. The rate, 0.1 batch / 256, rises for 10 epochs and then
decays to zero along a cosine, all by the step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification import common as classification
from mtv_jax.evals.classification.common import AUGMENTS, OneVector
from mtv_jax.evals.classification.linear_probe import crops_of
from mtv_jax.evals.core import crops, global_features, probe
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.examples import ClassificationSet
from mtv_jax.utils.errors import check_choice

_EPS = 1e-6
_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class MaeProbe(OneVector):
  """MAE's linear probe.

  Attributes:
    base_rate: learning rate at a batch of 256.
    epochs: 90, and MAE's own choice for ViT-L and larger is 50.
    warmup: epochs of these.
    train_batch: images a step, at most those of the training set. The rate
      follows what is used.
    augment: `crops` encodes a random crop of every image of every step,
      which costs epochs x images forward passes; `cached` trains on features
      that are computed once. `crops` by default, but `cached` on scenes and
      where these passes are more than 100 times the training images.
    seed: of batches, crops and the head.
  """

  base_rate: float = 0.1
  epochs: int = 90
  warmup: int = 10
  train_batch: int = 16_384
  augment: str | None = None
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.augment is not None:
      check_choice("MaeProbe: augment", self.augment, AUGMENTS)
    if not 0 <= self.warmup < self.epochs or self.train_batch < 2:
      raise ValueError(
        f"MaeProbe: epochs={self.epochs}, warmup={self.warmup}, train_batch="
        f"{self.train_batch}; expected 0 <= warmup < epochs, a batch of 2 or "
        "more"
      )

  def run(self, encoder: Encoder) -> Result:
    """Top-1, top-5 and mean-per-class accuracy after the last step."""
    data, encoder = self._set, self._view(encoder)
    images = len(data.train.labels)
    size = min(self.train_batch, images)
    each = images // size
    steps, rate = self.epochs * each, self.base_rate * size / 256
    augment = self._augmentation(
      self.augment, steps=steps, batch=size, images=images
    )
    tested = self._embed(encoder, data.test)
    fitted = fit(
      self._batches(encoder, data.train, augment, size),
      width=tested.shape[1],
      classes=data.classes,
      rate=rate,
      steps=steps,
      warmup=self.warmup * each,
      seed=self.seed,
      mesh=getattr(encoder, "mesh", None),
    )
    protocol = {
      **self._common(encoder),
      "head": "batch norm without affine (eps 1e-6), linear (N(0, 0.01))",
      "optimizer": "LARS, trust 0.001, momentum 0.9, none for the bias",
      "rate": rate,
      "schedule": "linear warm-up, cosine to 0, by the step",
      "epochs": self.epochs,
      "warmup_epochs": self.warmup,
      "steps": steps,
      "train_batch": size,
      "train_batch_asked": self.train_batch,
      "augment": crops.PROTOCOL if augment == "crops" else "none",
      "crops_encoded": steps * size if augment == "crops" else 0,
      "selection": "none, the last step",
      "last_loss": float(fitted.losses[-1]),
      "seed": self.seed,
      "ties": "the lowest class of equal ones",
    }
    return Result(
      classification.accuracies(scores(fitted, tested), data.test.labels),
      protocol,
      classification.chance(data.classes),
    )

  def _batches(
    self, encoder: Encoder, train: ClassificationSet, augment: str, size: int
  ) -> probe.Batches:
    take = probe.shuffled_batches(
      len(train.labels), batch_size=size, seed=self.seed
    )
    if augment == "cached":
      x = self._embed(encoder, train)
      return lambda step: {
        "x": x[take(step)],
        "label": train.labels[take(step)],
      }

    def batch(step: int) -> dict[str, Any]:
      items = take(step)
      x = global_features.embed_crops(
        encoder,
        crops_of(encoder, train, items, seed=(self.seed, step)),
        feature=self.feature,
        batch_size=self.batch_size,
      )
      return {"x": x, "label": train.labels[items]}

    return batch


def lars(
  rate: optax.ScalarOrSchedule, *, trust: float = 0.001, momentum: float = 0.9
) -> optax.GradientTransformation:
  """LARS as MAE runs it: the momentum collects what the rate then scales.

  (`optax.lars` scales by the rate first, which is something else when the
  rate changes.)
  """

  def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)

  return optax.chain(
    optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), matrices),
    optax.trace(momentum),
    optax.scale_by_learning_rate(rate),
  )


def fit(
  batches: probe.Batches,
  *,
  width: int,
  classes: int,
  rate: float,
  steps: int,
  warmup: int,
  seed: int = 0,
  mesh: Any = None,
) -> probe.FitResult:
  """Trains the head.

  Args:
    batches: by step, `x` `[b, width]` and `label` `[b]`.
    width: of the features.
    classes: how many there are.
    rate: the highest learning rate.
    steps: in all.
    warmup: steps in which the rate rises from zero.
    seed: of the kernel.
    mesh: as for `probe.fit`.
  """
  rng = np.random.default_rng(seed)
  kernel = rng.normal(0, 0.01, (width, classes)).astype(np.float32)

  def schedule(step):
    rising = step / max(1, warmup)
    along = (step - warmup) / (steps - warmup)
    falling = 0.5 * (1 + jnp.cos(jnp.pi * along))
    return rate * jnp.where(step < warmup, rising, falling)

  def loss(params, state, batch, rng):
    del rng
    x, state = probe.batch_norm_train(batch["x"], state, eps=_EPS)
    logits = x @ params["kernel"] + params["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return losses.mean(), state

  return probe.fit(
    loss,
    {"kernel": kernel, "bias": np.zeros(classes, np.float32)},
    batches,
    optimizer=lars(schedule),
    steps=steps,
    state=probe.batch_norm_stats(width),
    mesh=mesh,
  )


def scores(
  fitted: probe.FitResult, x: Float32[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n c"]:
  """Logits, normalised by the running statistics."""
  params, state = jax.tree.map(np.asarray, (fitted.params, fitted.state))
  found = [
    np.asarray(_scores(params, state, x[s : s + _ROWS]))
    for s in range(0, len(x), _ROWS)
  ]
  return np.concatenate(found)


@jax.jit
def _scores(params, state, x):
  x = probe.batch_norm_eval(x, state, eps=_EPS)
  product = jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
  return product + params["bias"]
