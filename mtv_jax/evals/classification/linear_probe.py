"""Linear classification of frozen features, as DINOv2 does it.

One head for each of 13 learning rates, for the token of the last block or of
the last four, without or with the mean patch beside it: 52 heads, trained
together on the same batches, of which the best one is reported (Oquab et al.
2024). Each is x W + b with W ~ N(0, 0.01^2) and b = 0, trained by SGD with
momentum 0.9 and without weight decay; the rate times batch / 256 decays to
zero along a cosine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification import common as classification
from mtv_jax.evals.classification import linear_heads
from mtv_jax.evals.classification.common import AUGMENTS, Classification
from mtv_jax.evals.core import crops, global_features, probe
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.examples import ClassificationSet, Images
from mtv_jax.utils.errors import check_choice

RATES = tuple(m * 10.0**e for e in range(-5, -1) for m in (1, 2, 5)) + (0.1,)


@dataclasses.dataclass(frozen=True)
class LinearProbe(Classification):
  """Linear classification, the best of many heads.

  Attributes:
    rates: learning rates at a batch of 256; 13 from 1e-5 to 0.1 by default.
    blocks: numbers of last blocks whose tokens a head reads, capped by the
      encoder's.
    average: `off`, `on` or both: heads without or with the mean patch.
    steps: of SGD; 12,500 by default, on scenes 300.
    train_batch: images a step; 1,024 by default, on scenes 256.
    augment: `crops` encodes a random crop of every image of every step, which
      costs steps x train_batch forward passes; `cached` trains on features
      that are computed once. `crops` by default, but `cached` on scenes and
      where these passes are more than 100 times the training images.
    select: which images decide on the best head, see
      `classification.selection`.
    seed: of batches, crops and heads.
  """

  rates: tuple[float, ...] = RATES
  blocks: tuple[int, ...] = (1, 4)
  average: tuple[str, ...] = ("off", "on")
  steps: int | None = None
  train_batch: int | None = None
  augment: str | None = None
  select: str = "val"
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    check_choice("LinearProbe: select", self.select, classification.SELECTIONS)
    if self.augment is not None:
      check_choice("LinearProbe: augment", self.augment, AUGMENTS)
    for value in self.average:
      check_choice("LinearProbe: average", value, ("off", "on"))
    if not (self.rates and self.blocks and self.average):
      raise ValueError(
        "LinearProbe: rates, blocks and average need one value each at least; "
        f"got {self.rates}, {self.blocks}, {self.average}"
      )
    if min(self.blocks) < 1:
      raise ValueError(f"LinearProbe: blocks={self.blocks}; expected 1 or more")

  def run(self, encoder: Encoder) -> Result:
    """Top-1, top-5 and mean-per-class accuracy of the best head."""
    data, encoder = self._set, self._view(encoder)
    chosen = classification.selection(data, self.select)
    steps = self._resolve(self.steps, published=12_500, scenes=300)
    size = self._resolve(self.train_batch, published=1024, scenes=256)
    augment = self._augmentation(
      self.augment, steps=steps, batch=size, images=len(chosen.train)
    )
    train = data.train.select(chosen.train)
    tested = self._table(encoder, data.test.images)
    fitted = linear_heads.train(
      self._batches(encoder, train, augment, size),
      columns=tested.columns,
      rates=self.rates,
      classes=data.classes,
      steps=steps,
      batch_size=size,
      seed=self.seed,
      mesh=getattr(encoder, "mesh", None),
    )
    shown, labels = tested, data.test.labels
    if self.select == "train_split":
      held = data.train.select(chosen.chosen_on)
      shown, labels = self._table(encoder, held.images), held.labels
    every = linear_heads.top1(fitted.params, shown, labels)
    name = max(every, key=lambda head: every[head].max())
    rate = int(np.argmax(every[name]))
    scores = linear_heads.scores(fitted.params, tested, name=name, rate=rate)
    protocol = {
      **self._common(encoder),
      "tokens": global_features.token_kinds(encoder),
      "head": "linear, kernel N(0, 0.01), bias 0",
      "heads": list(every),
      "rates": list(self.rates),
      "optimizer": "SGD, momentum 0.9, rate x batch / 256, cosine to 0",
      "steps": steps,
      "train_batch": size,
      "augment": crops.PROTOCOL if augment == "crops" else "none",
      "crops_encoded": steps * size if augment == "crops" else 0,
      "trained_on": len(chosen.train),
      "selection": chosen.how,
      "selected": {"head": name, "rate": self.rates[rate]},
      "top1_where_selected": {k: v.tolist() for k, v in every.items()},
      "last_loss": float(fitted.losses[-1]),
      "seed": self.seed,
      "ties": "the lowest class, rate and number of blocks of equal ones",
    }
    return Result(
      classification.accuracies(scores, data.test.labels),
      protocol,
      classification.chance(data.classes),
    )

  def _table(self, encoder: Encoder, images: Any, **options: Any):
    depth = encoder.spec.image.depth
    blocks = sorted({min(b, depth) for b in self.blocks})
    found = global_features.last_blocks(
      encoder,
      images,
      blocks=blocks[-1],
      batch_size=self.batch_size,
      **options,
    )
    return linear_heads.table(found, blocks=blocks, average=self.average)

  def _batches(
    self, encoder: Encoder, train: ClassificationSet, augment: str, size: int
  ) -> probe.Batches:
    take = probe.shuffled_batches(
      len(train.labels), batch_size=size, seed=self.seed
    )
    if augment == "cached":
      x = self._table(encoder, train.images).x
      return lambda step: {
        "x": x[take(step)],
        "label": train.labels[take(step)],
      }

    def batch(step: int) -> probe.Batch:
      items = take(step)
      cropped = crops_of(encoder, train, items, seed=(self.seed, step))
      x = self._table(encoder, cropped, pixels="crops").x
      return {"x": x, "label": train.labels[items]}

    return batch


def crops_of(
  encoder: Encoder,
  data: ClassificationSet,
  items: np.ndarray,
  *,
  seed: tuple[int, ...],
) -> Images:
  """Random crops of some images, each from its own place in `items`."""
  size = encoder.preprocess.size

  def read(i: int) -> np.ndarray:
    rng = np.random.default_rng((*seed, i))
    image = data.images[int(items[i])]
    return crops.random_crop(image, size=size, rng=rng)

  return Images(read, len(items))
