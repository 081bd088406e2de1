"""Base classes and metrics of the classification probes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32, Int, UInt8

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import bootstrap, global_features, probe, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import ClassificationSet, Data, LazySequence
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.registry import Splits
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.utils.errors import ConfigError, InputError

# Metrics, and further protocol entries.
Evaluation = tuple[Estimate, dict[str, Any]]
# Images for selecting a hyper-parameter, see `split_for_selection`.
Select = Literal["val", "train_split"]
_TRAIN_SCENES, _TEST_SCENES = 800, 400

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClassificationProbe(Evaluator):
  """Base class of the probes: data, views and the result.

  Subclasses define `_evaluate`. None means the published value, or a smaller
  value on scenes.

  Attributes:
    data: a data set with a training split (`datasets/registry.py`), or only
      test images.
    train: the training images, if `data` lacks a training split.
    view: see `global_features.with_view`; on scenes `encoder`.
    count: test images, evenly spaced; all by default, 400 scenes.
    train_count: training images, evenly spaced; all by default, 800 scenes.
  """

  data: Data = "scenes"
  train: Data | None = None
  view: global_features.ViewName | None = None
  count: PositiveInt | None = None
  train_count: PositiveInt | None = None
  batch_size: PositiveInt = 64

  published_view: ClassVar[str] = "center"

  def __post_init__(self):
    super().__post_init__()
    for name, value in vars(self).items():
      if value == ():
        raise ConfigError(f"{name} is empty; expected at least one value")

  @functools.cached_property
  def _set(self) -> Splits:
    return registry.open_splits(
      self.data,
      train=self.train,
      count=self._default(self.count, None, _TEST_SCENES),
      train_count=self._default(self.train_count, None, _TRAIN_SCENES),
    )

  def run(self, encoder: Encoder) -> Result:
    """Returns the probe's metrics."""
    return self.run_on(encoder, self._set)

  def run_on(self, encoder: Encoder, data: Splits) -> Result:
    """As `run`, with other data."""
    view = self._view_name()
    encoder = global_features.with_view(encoder, view)
    estimate, protocol = self._evaluate(encoder, data)
    described = {**encoder.protocol(), **data.protocol(), "view": view}
    chance = chance_accuracies(estimate.metrics, data.classes)
    return Result.from_estimate(estimate, described | protocol, chance)

  def _view_name(self) -> str:
    return self._default(self.view, self.published_view, "encoder")

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    raise NotImplementedError(f"{type(self).__name__} lacks _evaluate()")

  def _default(self, value: Any, published: Any, scenes: Any) -> Any:
    """The option's value, or its default for the data."""
    if value is not None:
      return value
    return scenes if is_scenes(self.data) else published


@dataclasses.dataclass(frozen=True)
class FeatureProbe(ClassificationProbe):
  """Base class of probes on one feature vector per image."""

  # See `global_features.embed`.
  feature: Literal["pooled", "cls", "mean"] = "pooled"

  def _features(
    self, encoder: Encoder, data: ClassificationSet, *, pixels: str = "images"
  ) -> Float32[np.ndarray, "n d"]:
    options = {"feature": self.feature, "batch_size": self.batch_size}
    return global_features.embed(encoder, data, pixels=pixels, **options)


@dataclasses.dataclass(frozen=True)
class TrainedProbe(ClassificationProbe):
  """Base class of probes trained by gradient descent.

  Subclasses define `_features`, as `FeatureProbe` does.

  Attributes:
    augment: `crops` encodes random crops at every step (steps x batch forward
      passes); `cached` trains on features computed once. Defaults to `crops`,
      but to `cached` on scenes and if the published schedule has more than 100
      epochs.
    published: trains the full published schedule, even on scenes or few
      images; by default capped at 100 epochs (`probe.resolve_schedule`).
    seed: seed of batches, crops and heads.
  """

  # Not "none", which the command line parses as None.
  augment: Literal["cached", "crops"] | None = None
  published: bool = False
  seed: int = 0

  def _augmentation(
    self, *, steps: int, batch: int, images: int, is_capped: bool = False
  ) -> str:
    """Resolves `augment`; the default depends on the cost.

    `is_capped`: the published schedule would exceed the epoch limit.
    """
    name = type(self).__name__
    encoded = steps * batch
    costly = is_capped or encoded > probe.MAX_PASSES * images
    costly &= not self.published
    cached = costly or (is_scenes(self.data) and not self.published)
    augment = self.augment or ("cached" if cached else "crops")
    if self.augment is None and costly and not is_scenes(self.data):
      log.warning(
        "%s: %d steps of %d crops are %d times the %d training images%s, so "
        "features are computed once; set augment='crops' to encode crops, or "
        "published=True to train in full as published",
        name,
        steps,
        batch,
        encoded // images,
        images,
        ", as many as a shortened schedule has" if is_capped else "",
      )
    if augment == "crops":
      log.info(
        "%s: encodes %d random crops (%d steps of %d) of %d training images",
        name,
        encoded,
        steps,
        batch,
        images,
      )
    return augment

  def _batches(
    self, encoder: Encoder, train: ClassificationSet, augment: str, size: int
  ) -> probe.Batches:
    """Shuffled batches by step: `x` `[size, d]` and `label` `[size]`."""
    indices = probe.shuffled_batches(
      len(train.labels), batch_size=size, seed=self.seed
    )
    if augment == "cached":
      cached = self._features(encoder, train)
      rows = {"x": cached, "label": train.labels}
      return lambda step: {k: v[indices(step)] for k, v in rows.items()}

    def batch(step: int) -> probe.FeatureBatch:
      items = indices(step)
      label = train.labels[items]

      def crop(row: int) -> np.ndarray:
        image = train.images[int(items[row])]
        rng = np.random.default_rng((self.seed, step, row))
        return random_crop(image, size=encoder.preprocess.size, rng=rng)

      images = LazySequence(crop, len(items))
      data = dataclasses.replace(train, images=images, labels=label)
      x = self._features(encoder, data, pixels="crops")
      return {"x": x, "label": label}

    return batch

  def _training_protocol(
    self, fitted: probe.FitResult, *, augment: str, batch_size: int
  ) -> dict[str, Any]:
    steps, encoded = len(fitted.losses), augment == "crops"
    return {
      "steps": steps,
      "train_batch": batch_size,
      "augment": CROP_PROTOCOL if encoded else "none",
      "crops_encoded": steps * batch_size if encoded else 0,
      "last_loss": float(fitted.losses[-1]),
      "seed": self.seed,
    }


def split_for_selection(
  data: Splits, select: Select
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " h"] | None, str]:
  """Splits the training images for selecting a hyper-parameter.

  `val` selects on the test images, as the published protocols do; the reported
  metric is slightly optimistic. `train_split` trains on nine tenths of each
  class and selects on one tenth. Returns the indices to train on, the indices
  to select on (None for the test images), and a text for the protocol.
  """
  if select == "val":
    how = "the best on the test images themselves, as published"
    return np.arange(len(data.train.labels)), None, how
  train, held_out = hold_out(data.train.labels)
  if not held_out.size:
    raise InputError(
      f"select='train_split': {data.train.name} has one image per class, so "
      "none can be held out; use select='val'"
    )
  how = f"the best on {len(held_out)} training images, a tenth of each class"
  return train, held_out, how


def hold_out(
  labels: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " h"]]:
  """Sorted indices to train on and to hold out.

  Holds out one in ten images per class, none of a single-image class.
  """
  order = np.argsort(labels, kind="stable")
  counts = np.bincount(labels)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  rank = np.arange(len(labels)) - starts
  total = np.repeat(counts, counts)
  # The middle of each ten, so that a class of two to nine holds out one too.
  out = (rank % 10 == np.minimum(10, total) // 2) & (total > 1)
  return np.sort(order[~out]), np.sort(order[out])


def rank_accuracies(
  ranks: Int[np.ndarray, " n"],
  labels: Int[np.ndarray, " n"],
  *,
  groups: Int[np.ndarray, " n"] | None = None,
) -> Estimate:
  """Top-1, top-5 and mean-per-class accuracy from ranks of the true classes.

  The mean is over classes in `labels`. `groups` are the 0-based items to
  resample, such as the images of boxes; by default each rank is an item.
  """
  correct = ranks < 1
  items = np.arange(len(labels)) if groups is None else groups

  def mean_per_class(weights):
    counts = np.bincount(labels, weights[items])
    hits = np.bincount(labels, weights[items] * correct)
    present = counts > 0
    return {"mean_per_class": np.mean(hits[present] / counts[present])}

  hits = {"top1": correct, "top5": ranks < 5}
  return bootstrap.means(hits, groups=groups) | bootstrap.estimate(
    mean_per_class, int(items.max()) + 1
  )


def score_accuracies(
  scores: Float32[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]
) -> Estimate:
  """`rank_accuracies` from class scores."""
  is_correct = labels[:, None] == np.arange(scores.shape[1])
  ranks = map_rows(ranking.ranks_of_scores, scores, is_correct)
  return rank_accuracies(ranks, labels)


def chance_accuracies(names: Iterable[str], classes: int) -> dict[str, float]:
  """Expected accuracies of a uniform guess, by metric."""
  return {
    name: min(5 if name == "top5" else 1, classes) / classes for name in names
  }


def map_rows(
  function: Callable[..., Any], *arrays: np.ndarray, rows: int = 4096
) -> Float[np.ndarray, "n ..."] | Int[np.ndarray, "n ..."]:
  """Applies `function` to blocks of rows; concatenates on the host."""
  blocks = (slice(s, s + rows) for s in range(0, len(arrays[0]), rows))
  parts = [np.asarray(function(*(a[b] for a in arrays))) for b in blocks]
  return np.concatenate(parts)


CROP_PROTOCOL = "random crop (area 0.08..1, ratio 3/4..4/3, bicubic), flip 0.5"
_ATTEMPTS = 10


def crop_box(
  height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Random crop (left, top, right, bottom) in pixels.

  Falls back to a center crop at the nearest allowed aspect ratio after ten
  draws that don't fit.
  """
  area = height * width
  for _ in range(_ATTEMPTS):
    target = area * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = round(math.sqrt(target * ratio))
    h = round(math.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return left, top, left + w, top + h
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_crop(
  image: UInt8[np.ndarray, "h w 3"], *, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
  """Random resized crop of `size` x `size`, flipped with probability 0.5.

  Inception crop (Szegedy et al. 2015) with torchvision's constants: 8 to 100 %
  of the area, log-uniform aspect ratio in 3/4..4/3, antialiased bicubic
  resampling.
  """
  height, width = image.shape[:2]
  crop = PIL.Image.fromarray(image).crop(crop_box(height, width, rng))
  crop = np.asarray(crop.resize((size, size), PIL.Image.Resampling.BICUBIC))
  return crop[:, ::-1] if rng.random() < 0.5 else crop
