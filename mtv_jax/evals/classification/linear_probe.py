"""Linear probe of DINOv2 (Oquab et al. 2024).

One head for each of 13 learning rates, for the token of the last block or of
the last four, without or with the mean patch: 52 heads, trained together on the
same batches, of which the best is reported. Each is x W + b with W ~ N(0,
0.01^2) and b = 0, trained by SGD with momentum 0.9 and without weight decay;
the rate times batch / 256 decays to zero along a cosine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification import linear_heads
from mtv_jax.evals.classification.base import (
  SELECTIONS,
  TrainedProbe,
  score_accuracies,
  split_for_selection,
)
from mtv_jax.evals.core import global_features
from mtv_jax.evals.core.examples import ClassificationSet
from mtv_jax.evals.datasets.splits import Splits
from mtv_jax.utils.errors import InputError, check_choice

RATES = tuple(m * 10.0**e for e in range(-5, -1) for m in (1, 2, 5)) + (0.1,)


@dataclasses.dataclass(frozen=True)
class LinearProbe(TrainedProbe):
  """DINOv2's linear probe: accuracy of the best head.

  Attributes:
    rates: learning rates at a batch of 256; 13 from 1e-5 to 0.1 by default.
    blocks: numbers of last blocks whose tokens a head reads, capped by the
      encoder's.
    average: `off`, `on` or both: heads without or with the mean patch.
    steps: of SGD; 12,500 by default, on scenes 300.
    train_batch: images a step; 1,024 by default, on scenes 256.
    select: the images that the best head is selected on, see
      `split_for_selection`.
  """

  rates: tuple[float, ...] = RATES
  blocks: tuple[int, ...] = (1, 4)
  average: tuple[str, ...] = ("off", "on")
  steps: int | None = None
  train_batch: int | None = None
  select: str = "val"

  def __post_init__(self):
    super().__post_init__()
    self._check("select", SELECTIONS)
    for value in self.average:
      check_choice("LinearProbe: average", value, ("off", "on"))
    if not (self.rates and self.blocks and self.average):
      raise InputError(
        "LinearProbe: rates, blocks and average need one value each at least; "
        f"got {self.rates}, {self.blocks}, {self.average}"
      )
    if min(self.blocks) < 1:
      raise InputError(f"LinearProbe: blocks={self.blocks}; expected 1 or more")

  def _evaluate(
    self, encoder: Encoder, data: Splits
  ) -> tuple[dict[str, float], dict[str, Any]]:
    split = split_for_selection(data, self.select)
    steps = self._default(self.steps, 12_500, 300)
    size = self._default(self.train_batch, 1024, 256)
    augment = self._augmentation(
      steps=steps, batch=size, images=len(split.train)
    )
    train = data.train.select(split.train)
    test = self._table(encoder, data.test)
    fitted = linear_heads.train(
      self._batches(encoder, train, augment=augment, batch_size=size),
      columns=test.columns,
      rates=self.rates,
      classes=data.classes,
      steps=steps,
      batch_size=size,
      seed=self.seed,
      mesh=getattr(encoder, "mesh", None),
    )
    validation, labels = test, data.test.labels
    if split.held_out is not None:
      held_out = data.train.select(split.held_out)
      validation, labels = self._table(encoder, held_out), held_out.labels
    top1 = linear_heads.top1(fitted.params, validation, labels)
    name = max(top1, key=lambda head: top1[head].max())
    rate = int(np.argmax(top1[name]))
    scores = linear_heads.scores(fitted.params, test, name=name, rate=rate)
    return score_accuracies(scores, data.test.labels), {
      "tokens": global_features.token_kinds(encoder),
      "head": "linear, kernel N(0, 0.01), bias 0",
      "heads": list(top1),
      "rates": list(self.rates),
      "optimizer": "SGD, momentum 0.9, rate x batch / 256, cosine to 0",
      **self._training_protocol(fitted, augment=augment, batch_size=size),
      "trained_on": len(split.train),
      "selection": split.protocol,
      "selected": {"head": name, "rate": self.rates[rate]},
      "top1_where_selected": {k: v.tolist() for k, v in top1.items()},
      "ties": "the lowest class, rate and number of blocks of equal ones",
    }

  def _table(
    self, encoder: Encoder, data: ClassificationSet, *, pixels: str = "images"
  ) -> linear_heads.Table:
    depth = encoder.spec.image.depth
    blocks = sorted({min(b, depth) for b in self.blocks})
    features = global_features.last_blocks(
      encoder,
      data.images,
      blocks=blocks[-1],
      batch_size=self.batch_size,
      pixels=pixels,
    )
    return linear_heads.make_table(
      features, blocks=blocks, average=self.average
    )

  def _features(
    self, encoder: Encoder, data: ClassificationSet, *, pixels: str = "images"
  ) -> Float32[np.ndarray, "n f"]:
    return self._table(encoder, data, pixels=pixels).x
