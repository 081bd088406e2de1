"""Linear segmentation probe on frozen features (ADE20K, NYU-40, scenes).

Protocol A, the default, is DINOv3's linear probe: patch tokens of the last
block after the final norm; channel dropout, batch norm and a 1x1 convolution;
augmented 512 x 512 crops, cross-entropy, AdamW for 40,000 steps of 16; windows
of 512 with stride 341 on images of short side 512; mIoU over the whole
validation set for the best head among checkpoints every 5,000 steps.

Protocol B, DINOv2's, sets `dropout=0`, and for its "+ms" metrics
`head="multilayer"`, `size=640`, several `scales` and `flips="both"`.

`head` selects the decoder: `linear` is DINOv3's on the last block; `multilayer`
is DINOv2's "+ms" head on the last four blocks, without dropout; `conv` adds two
3x3 convolutions on the last block of each quarter. `conv` is our choice of a
stronger decoder, not a published protocol.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from mtv_jax.config.options import NonNegativeFloat, PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import dense, probe, probe_heads, resizing
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.examples import IGNORE, SegmentationSet
from mtv_jax.evals.core.probe_heads import ProbeHead
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.segmentation import augment, sliding_window
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation.metrics import (
  SegmentationEvaluator,
)
from mtv_jax.models.heads import dpt
from mtv_jax.parallel.distributed import shared_map
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
# Limit of cached training features, without augmentation.
_CACHE_BYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class Segmentation(SegmentationEvaluator):
  """Linear segmentation probe: mIoU, mAcc and aAcc.

  None means the published value on real data and a small value on scenes; the
  published `size` is 512 and the default `stride` two thirds of it.

  Attributes:
    head: the decoder, see above.
    layers: blocks whose tokens are concatenated, see `out_indices`; `LAST` for
      `linear`, `FOUR_LAST` for `multilayer`, `FOUR_EVEN` for `conv`.
    norm: `final` applies the encoder's final norm to every layer, `none` does
      not.
    scales, flips: views whose softmax is averaged, see `Slide`.
    augment: `official` encodes augmented crops at every step, `mmseg` with
      mmsegmentation's distortion of colours; `none` encodes the evaluation's
      windows once.
    steps: training steps: 40,000; fewer for fewer than 6,400 training images;
      300 on scenes.
    batch_size: images per step: 16.
    published: trains the full published schedule, even on scenes or few
      images; by default capped at 100 epochs (`probe.resolve_schedule`).
    learning_rate: peak learning rate: 1e-3, 1e-2 on scenes.
    dropout: channel dropout rate: 0.1, 0 for `multilayer`.
    conv_features: channels of the convolutions: 256, 64 on scenes.
    eval_every: steps between saved heads: an eighth of the steps, all steps on
      scenes. The best and the last head are reported.
    train_split: `test` trains on the test images, as a smoke test on part of a
      data set; the metrics are then meaningless.
  """

  # `batch_size` is the training batch size, so metrics depend on it.
  _neutral = SegmentationEvaluator._neutral - {"batch_size"}

  head: Literal["linear", "multilayer", "conv"] = "linear"
  layers: Literal["LAST", "FOUR_LAST", "FOUR_EVEN"] | None = None
  norm: Literal["final", "none"] = "final"
  scales: tuple[float, ...] = (1.0,)
  flips: Literal["none", "both"] = "none"
  augment: Literal["official", "mmseg", "none"] | None = None
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
      raise ConfigError(f"dropout is {self.dropout}; expected a number below 1")

  @functools.cached_property
  def _set(self) -> tuple[SegmentationSet, SegmentationSet]:
    train = registry.open_segmentation(
      self.data, split=self.train_split, count=self.train_count
    )
    test = registry.open_segmentation(self.data, split="test", count=self.count)
    return train, test

  def run(self, encoder: Encoder) -> Result:
    """Trains the head; returns metrics of the best and the last saved head."""
    _, test = self._set
    plan = self._make_plan(encoder)
    features = functools.partial(
      dense.features,
      encoder,
      blocks=plan.blocks,
      norm=self.norm,
      batch_size=self.encode_batch,
    )
    head = ProbeHead(
      test.class_count,
      dropout=plan.dropout,
      convs=2 if self.head == "conv" else 0,
      conv_features=plan.conv_features,
    )
    fit_result, windows = self._fit(encoder, head, plan, features)
    predict = probe_heads.predict_fn(
      head,
      list(fit_result.snapshots.values()),
      mesh=encoder.mesh,
      batch_size=self.encode_batch,
    )
    predictions = self._predict(
      lambda windows: np.stack(predict(features(windows)), axis=-2),
      test,
      plan.slide,
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
      "best_step": list(fit_result.snapshots)[best],
      "train_windows": windows,
      "final_loss": float(fit_result.losses[-1]),
    }
    sheets = predictions.sheets("segmentation", head=best)
    return Result.from_estimate(estimate, protocol, chance, sheets=sheets)

  def _make_plan(self, encoder: Encoder) -> _Plan:
    scenes, patch = is_scenes(self.data), encoder.spec.image.patch_size
    size = self._window_size(encoder, 512)
    layers = self.layers or _LAYERS[self.head]
    use_small = scenes and not self.published
    schedule = probe.resolve_schedule(
      _PUBLISHED,
      images=len(self._set[0].images),
      steps=self.steps,
      batch_size=self.batch_size,
      uncapped=self.published,
      scenes=(300, _PUBLISHED[1]) if scenes else None,
    )
    schedule.warn("segmentation")
    steps = schedule.steps
    save_every = self.eval_every or (steps if use_small else max(1, steps // 8))
    return _Plan(
      slide=sliding_window.Slide(
        size=size,
        stride=self.stride or max(1, size * 2 // 3),
        short=size,
        scales=self.scales,
        multiple=32 if 32 % patch == 0 else patch,
        flips=self.flips,
      ),
      augment=self.augment or ("none" if use_small else "official"),
      schedule=schedule,
      # As published: 1,500 of 40,000 steps.
      warmup=round(steps * 1500 / 40_000),
      rate=self.learning_rate or (1e-2 if use_small else 1e-3),
      saved_steps=(*range(save_every, steps, save_every), steps),
      layers=layers,
      blocks=out_indices(layers, encoder.spec.image.depth),
      dropout=_DROPOUTS[self.head] if self.dropout is None else self.dropout,
      conv_features=self.conv_features or (64 if use_small else 256),
    )

  def _fit(
    self,
    encoder: Encoder,
    head: ProbeHead,
    plan: _Plan,
    features: dense.Encode,
  ) -> tuple[probe.FitResult, int | str]:
    """Trains the head; returns it and the number of training windows."""
    train, _ = self._set
    windows: int | str = "crops, drawn at every step"
    options = {"batch_size": plan.schedule.batch_size, "seed": self.seed}
    if plan.augment == "none":
      cache = list(self._encode_windows(features, plan.slide))
      windows = sum(len(part["targets"]) for part in cache)
      batches = dense.cached_batches(cache, **options)
    else:
      # The colour, in 0..255, that normalises to zero.
      crop = {"fill": np.float32(255) * np.float32(encoder.preprocess.mean)}
      crop |= {"size": plan.slide.size, "mmseg": plan.augment == "mmseg"}
      batches = dense.training_batches(
        features,
        lambda i, rng: augment.augment(*train.read_pair(i), rng, **crop),
        len(train.images),
        steps=plan.schedule.steps,
        **options,
      )
    channels = encoder.spec.image.width * len(plan.blocks)
    params, state = probe_heads.init_head(
      head, channels, np.random.default_rng(self.seed).standard_normal
    )
    rate = learning_rate_schedule(
      plan.rate, steps=plan.schedule.steps, warmup=plan.warmup
    )

    def loss(params, state, batch, rng):
      features = batch["features"]  # [B, h, w, C]
      logits, state = probe_heads.apply_training(
        head, params, state, features, rng
      )
      return pixel_loss(logits, batch["targets"]), state

    fit_result = probe.fit(
      loss,
      params,
      batches,
      optimizer=optax.adamw(rate, weight_decay=self.weight_decay),
      steps=plan.schedule.steps,
      state=state,
      seed=self.seed,
      mesh=encoder.mesh,
      snapshot_steps=plan.saved_steps,
    )
    return fit_result, windows

  def _encode_windows(
    self, features: dense.Encode, slide: sliding_window.Slide
  ) -> Iterator[probe.FeatureBatch]:
    """Encodes all windows; InputError if features exceed the cache limit."""
    train, _ = self._set

    def cut_windows(i: int) -> list[dense.LabelledInput]:
      image, labels = train.read_pair(i)
      shape = slide.shape(*image.shape[:2])
      labels = resizing.resize_maps(labels, shape, method="nearest")
      pixels = sliding_window.resize_image(image, shape)
      windows = (sliding_window.cut_windows(x, slide) for x in (pixels, labels))
      return list(zip(*windows, strict=True))

    windows = shared_map(cut_windows, range(len(train.images)))
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
    return {
      **self._common_protocol(encoder, test, plan.slide),
      "train_data": train.name,
      "train_split": self.train_split,
      "train_hash": train.digest,
      "train_images": len(train.images),
      "augment": augment.PROTOCOLS[plan.augment],
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
  """Options resolved for an encoder and a data set."""

  slide: sliding_window.Slide
  augment: str
  schedule: probe.ProbeSchedule
  warmup: int
  rate: float
  saved_steps: tuple[int, ...]
  layers: str
  blocks: tuple[int, ...]
  dropout: float
  conv_features: int


_START_FRACTION = 1e-6  # learning rate at step 0, as a fraction of the peak
_ROW_PARTS = 8


def out_indices(layers: str, depth: int) -> tuple[int, ...]:
  """Indices of the blocks that a head reads.

  `LAST`, `FOUR_LAST`, or the last block of each quarter (`FOUR_EVEN`: 2, 5, 8,
  11 of 12; 4, 11, 17, 23 of 24).
  """
  if layers == "LAST":
    return (depth - 1,)
  if depth < 4:
    raise InputError(
      f"layers={layers!r} reads four blocks, but this encoder has {depth}; use "
      "layers='LAST'"
    )
  if layers == "FOUR_LAST":
    return tuple(range(depth - 4, depth))
  return dpt.quarter_layers(depth)


def learning_rate_schedule(
  peak: float, *, steps: int, warmup: int
) -> optax.Schedule:
  """DINOv3's learning rate at step s of T, with W warmup steps.

  For s < W: peak * (1 - (1 - s / W) (1 - 1e-6)) * (1 - s / T), then
  peak / 2 * (1 + cos(pi (s + 1) / T)).
  """

  def rate(step):
    s = jnp.asarray(step, jnp.float32)
    progress = s / max(warmup, 1)
    # 1 - (1 - progress) (1 - 1e-6), without cancellation early on.
    warmup_factor = progress + _START_FRACTION * (1 - progress)
    linear = peak * warmup_factor * (1 - s / steps)
    cosine = peak / 2 * (1 + jnp.cos(jnp.pi * (s + 1) / steps))
    return jnp.where(s < warmup, linear, cosine)

  return rate


def pixel_loss(
  logits: Float[Array, "b h w k"], labels: UInt8[Array, "b H W"]
) -> Float[Array, ""]:
  """Cross-entropy at full size, mean over all pixels.

  As in mmsegmentation, ignored pixels have loss 0 but count in the mean.

  Full-size logits would be the largest arrays by far (2.5 GB for 16 crops of
  512 pixels and 150 classes). They are computed for an eighth of the rows at a
  time and recomputed in the backward pass.
  """
  b, height, width = labels.shape
  num_parts = math.gcd(height, _ROW_PARTS)
  wide = resizing.resize(logits, (logits.shape[1], width))  # [b, h, W, k]
  rows = resizing.matrix(logits.shape[1], height).astype(np.float32)

  @jax.checkpoint
  def add_rows(total, block):
    rows, labels = block
    full = jnp.einsum(
      "yh,bhxk->byxk", rows, wide, precision=jax.lax.Precision.HIGHEST
    )
    valid = labels != IGNORE
    target = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(full, target)
    return total + jnp.sum(jnp.where(valid, losses, 0.0)), None

  blocks = (
    jnp.asarray(rows.reshape(num_parts, height // num_parts, -1)),
    labels.reshape(b, num_parts, height // num_parts, width).swapaxes(0, 1),
  )
  total, _ = jax.lax.scan(add_rows, jnp.float32(0), blocks)
  return total / labels.size
