"""Linear segmentation probe on frozen features (ADE20K, NYU-40, scenes).

Protocol A, the default, is DINOv3's linear probe: patch tokens of the last
block after the final norm; channel dropout, batch norm and a 1x1 convolution;
cross-entropy at 512 x 512 under augmentation, AdamW for 40,000 steps of 16;
windows of 512 every 341 pixels on images of short side 512; mIoU of the whole
validation set, of the best of the heads saved every 5,000 steps.

Protocol B, DINOv2's, is options: `dropout=0`, and for its "+ms" metrics
`layers="FOUR_LAST"`, `size=640`, several `scales` and `flips="both"`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optax
from jaxtyping import UInt8

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import probe
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.examples import SegmentationSet
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.segmentation import augment, linear_head
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation.base import (
  SegmentationEvaluator,
  padding_colour,
)
from mtv_jax.evals.segmentation.sliding_window import Slide
from mtv_jax.utils.errors import InputError

AUGMENTS = ("official", "none")
# Features of the training windows that are cached without augmentation.
_CACHE_BYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class Segmentation(SegmentationEvaluator):
  """The linear segmentation probe: mIoU, mAcc and aAcc.

  None means the published value on real data and a small one on scenes; the
  published `size` is 512 and the default `stride` two thirds of it.

  Attributes:
    layers: `LAST`, `FOUR_LAST` or `FOUR_EVEN`, concatenated.
    norm: `final` applies the encoder's last norm to every layer, `none` to
      none of them.
    scales: factors of the image size, whose softmax is averaged.
    flips: `both` averages with the mirrored image, `none` does not.
    augment: `official` computes features of augmented crops at every step;
      `none` those of evaluation's windows, once.
    steps: updates of the head: 40,000, or 300 on scenes.
    batch_size: crops a step.
    learning_rate: peak of the schedule: 1e-3, or 1e-2 on scenes.
    weight_decay: AdamW's.
    dropout: probability that a channel is dropped.
    eval_every: updates between two saved heads: an eighth of the steps, or
      all of them on scenes. The best and the last are reported.
    train_split: `test` trains on the test images, which checks that everything
      runs and measures nothing: for fragments of a data set.
    train_count: images to train on, evenly spaced.
    seed: of the head, the order and the augmentation.
  """

  layers: str = "LAST"
  norm: str = "final"
  scales: tuple[float, ...] = (1.0,)
  flips: str = "none"
  augment: str | None = None
  steps: int | None = None
  batch_size: int = 16
  learning_rate: float | None = None
  weight_decay: float = 1e-3
  dropout: float = 0.1
  eval_every: int | None = None
  train_split: str = "train"
  train_count: int | None = None
  seed: int = 0

  def __post_init__(self):
    self._check(
      "segmentation",
      layers=linear_head.LAYERS,
      norm=linear_head.NORMS,
      augment=(None, *AUGMENTS),
      train_split=registry.SPLITS,
    )
    if not 0 <= self.dropout < 1:
      raise InputError(f"segmentation: dropout={self.dropout}; expected [0, 1)")

  @functools.cached_property
  def _sets(self) -> tuple[SegmentationSet, SegmentationSet]:
    """Images to train on, and to test on."""
    train = registry.open_segmentation(
      self.data, split=self.train_split, count=self.train_count
    )
    test = registry.open_segmentation(self.data, split="test", count=self.count)
    return train, test

  def prepare(self) -> None:
    """Lists both sets, and caches the lists."""
    _ = self._sets

  def run(self, encoder: Encoder) -> Result:
    """Trains the head; metrics of the best saved head and of the last."""
    train, test = self._sets
    plan = self._plan(encoder)
    trainer = _Trainer(self, encoder, plan, train)
    saved = trainer.fit()
    heads = linear_head.fold(list(saved.values()))
    predictions = self._predict(
      encoder,
      lambda windows: heads(trainer.features(windows)),
      test,
      plan.slide,
    )
    scores = [metrics_lib.scores(c) for c in predictions.counts]
    best = max(range(len(scores)), key=lambda i: scores[i].miou)
    metrics = {
      name + suffix: value
      for suffix, i in (("", best), ("_last", -1))
      for name, value in scores[i].metrics().items()
    }
    chance = metrics_lib.chance(predictions.counts[best])
    chance |= {f"{name}_last": value for name, value in chance.items()}
    protocol = {
      **self._protocol(encoder, plan),
      "best_step": list(saved)[best],
      "train_windows": trainer.windows,
      "final_loss": trainer.final_loss,
    }
    sheets = predictions.sheets("segmentation", head=best)
    return Result(metrics, protocol, chance, pictures=sheets)

  def _plan(self, encoder: Encoder) -> _Plan:
    scenes = is_scenes(self.data)
    size = self._window_size(encoder, 512)
    steps = self.steps or (300 if scenes else 40_000)
    every = self.eval_every or (steps if scenes else max(1, steps // 8))
    return _Plan(
      slide=Slide(
        size=size,
        stride=self.stride or max(1, size * 2 // 3),
        short=size,
        scales=tuple(float(s) for s in self.scales),
        flips=self.flips,
      ),
      augment=self.augment or ("none" if scenes else "official"),
      steps=steps,
      warmup=round(steps * linear_head.WARMUP),
      rate=self.learning_rate or (1e-2 if scenes else 1e-3),
      saved_steps=(*range(every, steps, every), steps),
    )

  def _protocol(self, encoder: Encoder, plan: _Plan) -> dict[str, Any]:
    train, test = self._sets
    official = plan.augment == "official"
    return {
      **self._common_protocol(encoder, test, plan.slide),
      "train_data": train.name,
      "train_split": self.train_split,
      "train_hash": train.digest,
      "train_images": len(train.images),
      "augment": augment.PROTOCOL if official else "none",
      "layers": self.layers,
      "blocks": list(linear_head.taps(self.layers, encoder.spec.image.depth)),
      "layer_norm": self.norm,
      "tokens": "patches",
      "head": f"channel dropout {self.dropout}, batch norm, 1x1 convolution",
      "loss": "cross-entropy at crop size, mean over all pixels",
      "optimizer": "AdamW 0.9, 0.999",
      "learning_rate": plan.rate,
      "weight_decay": self.weight_decay,
      "schedule": f"warm-up {plan.warmup}, cosine to 0",
      "steps": plan.steps,
      "batch_size": self.batch_size,
      "seed": self.seed,
      "kept_steps": list(plan.saved_steps),
      "selection": "miou: the kept head that is best on the test images; "
      "miou_last: the last one",
    }


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The options resolved for an encoder and a data set."""

  slide: Slide
  augment: str
  steps: int
  warmup: int
  rate: float
  saved_steps: tuple[int, ...]


class _Trainer:
  """Trains heads for one encoder on one set."""

  def __init__(
    self,
    options: Segmentation,
    encoder: Encoder,
    plan: _Plan,
    data: SegmentationSet,
  ):
    self._options, self._encoder = options, encoder
    self._plan, self._data = plan, data
    self._fill = padding_colour(encoder)
    self.windows: int | str = "crops, drawn at every step"
    self.final_loss = 0.0

  def features(self, windows: list[np.ndarray]) -> np.ndarray:
    return linear_head.features(
      self._encoder,
      windows,
      layers=self._options.layers,
      norm=self._options.norm,
      batch_size=self._options.encode_batch,
    )

  def fit(self) -> dict[int, tuple[Any, Any]]:
    """The saved heads by number of updates."""
    if self._plan.augment == "none":
      return self._fit(self._cached_batches())
    crops = augment.Crops(
      self._data,
      self._indices(len(self._data.images)),
      size=self._plan.slide.size,
      fill=self._fill,
      interpolation=self._plan.slide.interpolation,
      seed=self._options.seed,
    )
    with crops:

      def batch(step: int) -> probe.Batch:
        images, labels = crops(step)
        return {"features": self.features(images), "labels": labels}

      return self._fit(batch)

  def _indices(self, count: int) -> Callable[[int], np.ndarray]:
    return probe.shuffled_batches(
      count, batch_size=self._options.batch_size, seed=self._options.seed
    )

  def _fit(self, batches: probe.Batches) -> dict[int, tuple[Any, Any]]:
    options, plan, spec = self._options, self._plan, self._encoder.spec.image
    channels = spec.width * len(linear_head.taps(options.layers, spec.depth))
    params, state = linear_head.init(
      channels, self._data.class_count, seed=options.seed
    )
    rate = linear_head.schedule(plan.rate, steps=plan.steps, warmup=plan.warmup)
    fitted = probe.fit(
      linear_head.make_loss(options.dropout),
      params,
      batches,
      optimizer=optax.adamw(rate, weight_decay=options.weight_decay),
      steps=plan.steps,
      state=state,
      seed=options.seed,
      mesh=self._encoder.mesh,
      snapshot_steps=plan.saved_steps,
    )
    self.final_loss = float(fitted.losses[-1])
    return fitted.snapshots

  def _cached_batches(self) -> probe.Batches:
    """Batches of features that are computed once."""
    features, labels = [], []
    for windows, maps in self._window_batches():
      features.append(self.features(windows))
      labels += maps
      if features[0].nbytes * len(features) > _CACHE_BYTES:
        raise InputError(
          f"segmentation: the features of {self._data.name} take more than "
          f"{_CACHE_BYTES / 2**30:.0f} GiB, which augment='none' holds in "
          "memory. Use augment='official', or fewer images (train_count)."
        )
    tokens, truth = np.concatenate(features), np.stack(labels)
    self.windows = len(tokens)
    indices = self._indices(len(tokens))

    def batch(step: int) -> probe.Batch:
      items = indices(step)
      return {"features": tokens[items], "labels": truth[items]}

    return batch

  def _window_batches(
    self,
  ) -> Iterator[tuple[list[np.ndarray], list[UInt8[np.ndarray, "s s"]]]]:
    windows, maps = [], []
    size = 4 * self._options.encode_batch
    for i in range(len(self._data.images)):
      more = augment.cut_windows(
        self._data, i, self._plan.slide, fill=self._fill
      )
      windows += more[0]
      maps += more[1]
      while len(windows) >= size:
        yield windows[:size], maps[:size]
        windows, maps = windows[size:], maps[size:]
    if windows:
      yield windows, maps
