"""Linear segmentation probe on frozen features (ADE20K, NYU-40, scenes).

Protocol A, the default, is DINOv3's linear probe: patch tokens of the last
block after the final norm; channel dropout, batch norm and a 1x1 convolution;
cross-entropy at 512 x 512 under augmentation, AdamW for 40,000 steps of 16;
windows of 512 every 341 pixels on images of short side 512; mIoU of the whole
validation set, of the best of the heads saved every 5,000 steps.

Protocol B, DINOv2's, is options: `dropout=0`, and for its "+ms" metrics
`head="multilayer"`, `size=640`, several `scales` and `flips="both"`.

`head` selects the decoder: `linear` is DINOv3's on the last block; `multilayer`
that of DINOv2's "+ms", the same on the last four blocks without dropout; `conv`
has two 3x3 convolutions before it (see `conv_head.py`), on four blocks, one of
each quarter. `conv` is no published protocol of frozen encoders but our choice,
as a decoder stronger than a linear one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import optax

from mtv_jax.config.options import NonNegativeFloat, PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import dense, probe, resizing
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.examples import SegmentationSet
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.segmentation import (
  augment,
  conv_head,
  linear_head,
  sliding_window,
)
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation.base import (
  SegmentationEvaluator,
  padding_colour,
)
from mtv_jax.utils.errors import ConfigError, InputError

_PUBLISHED = (40_000, 16)  # steps, images per step
_LAYERS = {"linear": "LAST", "multilayer": "FOUR_LAST", "conv": "FOUR_EVEN"}
_DROPOUTS = {"linear": 0.1, "multilayer": 0.0, "conv": 0.1}
_LINEAR = "channel dropout {0.dropout}, batch norm, 1x1 convolution"
_HEADS = {
  "linear": _LINEAR,
  "multilayer": _LINEAR,
  "conv": "batch norm, two 3x3 convolutions of {0.conv_features} channels with "
  "batch norm and ReLU, channel dropout {0.dropout}, 1x1 convolution",
}
# Features of the training windows that are cached without augmentation.
_CACHE_BYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class Segmentation(SegmentationEvaluator):
  """The linear segmentation probe: mIoU, mAcc and aAcc.

  None means the published value on real data and a small one on scenes; the
  published `size` is 512 and the default `stride` two thirds of it.

  Attributes:
    head: the decoder, see above.
    layers: blocks whose tokens are concatenated, see `linear_head.taps`: `LAST`
      for `linear`, `FOUR_LAST` for `multilayer`, `FOUR_EVEN` for `conv`.
    norm: `final` applies the encoder's last norm to every layer, `none` does
      not.
    scales, flips: views whose softmax is averaged, see `Slide`.
    augment: `official` computes features of augmented crops at every step;
      `none` those of evaluation's windows, once.
    steps: updates of the head: 40,000, fewer for less than 6,400 training
      images, or 300 on scenes.
    batch_size: images of an update: 16.
    published: trains as published, also on scenes and on few images, of which a
      schedule has at most 100 passes otherwise (`probe.resolve_schedule`).
    learning_rate: peak of the schedule: 1e-3, or 1e-2 on scenes.
    dropout: probability that a channel is dropped: 0.1, or 0 of `multilayer`.
    conv_features: channels of the convolutions: 256, or 64 on scenes.
    eval_every: updates between two saved heads: an eighth of the steps, or
      all of them on scenes. The best and the last are reported.
    train_split: `test` trains on the test images, which checks that everything
      runs and measures nothing: for fragments of a data set.
    train_count: images to train on, evenly spaced.
  """

  # `batch_size` is that of the training.
  _neutral = SegmentationEvaluator._neutral - {"batch_size"}

  head: Literal["linear", "multilayer", "conv"] = "linear"
  layers: Literal["LAST", "FOUR_LAST", "FOUR_EVEN"] | None = None
  norm: Literal["final", "none"] = "final"
  scales: tuple[float, ...] = (1.0,)
  flips: Literal["none", "both"] = "none"
  augment: Literal["official", "none"] | None = None
  steps: PositiveInt | None = None
  batch_size: PositiveInt | None = None
  learning_rate: PositiveFloat | None = None
  weight_decay: NonNegativeFloat = 1e-3
  dropout: NonNegativeFloat | None = None
  conv_features: PositiveInt | None = None
  eval_every: PositiveInt | None = None
  train_split: Literal["train", "test"] = "train"
  train_count: PositiveInt | None = None
  published: bool = False
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.dropout is not None and self.dropout >= 1:
      raise ConfigError(f"dropout is {self.dropout}, expected a number below 1")

  @functools.cached_property
  def _set(self) -> tuple[SegmentationSet, SegmentationSet]:
    """Images to train on, and to test on."""
    train = registry.open_segmentation(
      self.data, split=self.train_split, count=self.train_count
    )
    test = registry.open_segmentation(self.data, split="test", count=self.count)
    return train, test

  def run(self, encoder: Encoder) -> Result:
    """Trains the head; metrics of the best saved head and of the last."""
    _, test = self._set
    plan = self._plan(encoder)
    features = functools.partial(
      dense.features,
      encoder,
      blocks=plan.blocks,
      norm=self.norm,
      batch_size=self.encode_batch,
    )
    fitted, windows = self._fit(encoder, plan, features)
    trained = list(fitted.snapshots.values())
    if self.head == "conv":
      heads = conv_head.predict_fn(
        trained, mesh=encoder.mesh, batch_size=self.encode_batch
      )
    else:
      heads = linear_head.fold(trained)
    predictions = self._predict(
      encoder, lambda windows: heads(features(windows)), test, plan.slide
    )
    totals = predictions.sums.sum(axis=0)  # [heads, 3, K]
    mious = [metrics_lib.scores(total)["miou"] for total in totals]
    best = int(np.argmax(mious))
    estimate, last = (
      metrics_lib.estimate(predictions.sums[:, head]) for head in (best, -1)
    )
    estimate |= last.rename("{}_last")
    chance = metrics_lib.chance(totals[best])
    chance |= {f"{name}_last": value for name, value in chance.items()}
    protocol = {
      **self._protocol(encoder, plan),
      "best_step": list(fitted.snapshots)[best],
      "train_windows": windows,
      "final_loss": float(fitted.losses[-1]),
    }
    sheets = predictions.sheets("segmentation", head=best)
    return Result(
      estimate.metrics,
      protocol,
      chance,
      errors=estimate.errors,
      resamples=estimate.resamples,
      sheets=sheets,
    )

  def _plan(self, encoder: Encoder) -> _Plan:
    scenes, patch = is_scenes(self.data), encoder.spec.image.patch_size
    size = self._window_size(encoder, 512)
    layers = self.layers or _LAYERS[self.head]
    small = scenes and not self.published
    if small:
      schedule = probe.Schedule(
        self.steps or 300, self.batch_size or _PUBLISHED[1], "scenes"
      )
    else:
      schedule = probe.resolve_schedule(
        _PUBLISHED,
        images=len(self._set[0].images),
        steps=self.steps,
        batch_size=self.batch_size,
        in_full=self.published,
      )
    steps = schedule.steps
    every = self.eval_every or (steps if small else max(1, steps // 8))
    return _Plan(
      slide=sliding_window.Slide(
        size=size,
        stride=self.stride or max(1, size * 2 // 3),
        short=size,
        scales=self.scales,
        multiple=32 if 32 % patch == 0 else patch,
        flips=self.flips,
      ),
      augment=self.augment or ("none" if small else "official"),
      schedule=schedule,
      warmup=round(steps * linear_head.WARMUP),
      rate=self.learning_rate or (1e-2 if small else 1e-3),
      saved_steps=(*range(every, steps, every), steps),
      layers=layers,
      blocks=linear_head.taps(layers, encoder.spec.image.depth),
      dropout=_DROPOUTS[self.head] if self.dropout is None else self.dropout,
      conv_features=self.conv_features or (64 if small else conv_head.FEATURES),
    )

  def _fit(
    self, encoder: Encoder, plan: _Plan, features: dense.Encode
  ) -> tuple[probe.FitResult, int | str]:
    """The head with its snapshots, and how many windows it was trained on."""
    train, _ = self._set
    windows: int | str = "crops, drawn at every step"
    options = {"batch_size": plan.schedule.batch_size, "seed": self.seed}
    if plan.augment == "none":
      cache = list(self._encode_windows(features, plan.slide))
      windows = sum(len(part["targets"]) for part in cache)
      batches = dense.cached_batches(cache, **options)
    else:
      batches = dense.training_batches(
        features,
        lambda i, rng: augment.augment(
          *dense.read_pair(train.name, train.images, train.maps, i),
          rng,
          size=plan.slide.size,
          fill=padding_colour(encoder),
          interpolation=plan.slide.interpolation,
        ),
        len(train.images),
        steps=plan.schedule.steps,
        **options,
      )
    channels = encoder.spec.image.width * len(plan.blocks)
    shape = {"seed": self.seed}
    module = linear_head
    if self.head == "conv":
      module, shape["features"] = conv_head, plan.conv_features
    params, state = module.init(channels, train.class_count, **shape)
    rate = linear_head.schedule(
      plan.rate, steps=plan.schedule.steps, warmup=plan.warmup
    )
    fitted = probe.fit(
      module.make_loss(plan.dropout),
      params,
      batches,
      optimizer=optax.adamw(rate, weight_decay=self.weight_decay),
      steps=plan.schedule.steps,
      state=state,
      seed=self.seed,
      mesh=encoder.mesh,
      snapshot_steps=plan.saved_steps,
    )
    return fitted, windows

  def _encode_windows(
    self, features: dense.Encode, slide: sliding_window.Slide
  ) -> Iterator[probe.Batch]:
    """Features of all windows; raises InputError if they exceed the cache."""
    train, _ = self._set

    def cut_windows(i: int) -> list[dense.Example]:
      image, labels = dense.read_pair(train.name, train.images, train.maps, i)
      shape = slide.shape(*image.shape[:2])
      labels = resizing.resize_maps(labels, shape, method="nearest")
      pixels = sliding_window.resize_image(image, shape, slide.interpolation)
      windows = (sliding_window.cut(x, slide) for x in (pixels, labels))
      return list(zip(*windows, strict=True))

    windows = dense.shared_map(cut_windows, range(len(train.images)))
    windows = itertools.chain.from_iterable(windows)
    total = 0
    for batch in dense.encode_batches(
      features, windows, batch_size=4 * self.encode_batch
    ):
      total += batch["features"].nbytes
      if total > _CACHE_BYTES:
        raise InputError(
          f"{train.name}: augment='none' caches all features, which "
          f"exceed {_CACHE_BYTES / 2**30:.0f} GiB; use augment='official' or a "
          "smaller train_count"
        )
      yield batch

  def _protocol(self, encoder: Encoder, plan: _Plan) -> dict[str, Any]:
    train, test = self._set
    official = plan.augment == "official"
    return {
      **self._common_protocol(encoder, test, plan.slide),
      "train_data": train.name,
      "train_split": self.train_split,
      "train_hash": train.digest,
      "train_images": len(train.images),
      "augment": augment.PROTOCOL if official else "none",
      "layers": plan.layers,
      "blocks": list(plan.blocks),
      "layer_norm": self.norm,
      "tokens": "patches",
      "head": _HEADS[self.head].format(plan),
      "loss": "cross-entropy at crop size, mean over all pixels",
      "optimizer": "AdamW 0.9, 0.999",
      "learning_rate": plan.rate,
      "weight_decay": self.weight_decay,
      "schedule": f"warm-up {plan.warmup}, cosine to 0",
      "steps": plan.schedule.steps,
      "batch_size": plan.schedule.batch_size,
      "schedule_length": plan.schedule.why,
      "seed": self.seed,
      "kept_steps": list(plan.saved_steps),
      "selection": "miou: the saved head that is best on the test images; "
      "miou_last: the last one",
    }


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The options resolved for an encoder and a data set."""

  slide: sliding_window.Slide
  augment: str
  schedule: probe.Schedule
  warmup: int
  rate: float
  saved_steps: tuple[int, ...]
  layers: str
  blocks: tuple[int, ...]
  dropout: float
  conv_features: int
