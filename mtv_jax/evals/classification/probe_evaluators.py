"""Base classes and metrics of the classification probes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32, Int, UInt8

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import bootstrap, global_features, probe, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import (
  ClassificationSet,
  Data,
  LazySequence,
  Splits,
)
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.utils.errors import ConfigError, InputError

# Metrics, and further protocol entries.
Evaluation = tuple[Estimate, dict[str, Any]]
# Images for selecting a hyper-parameter, see `split_for_selection`.
Select = Literal["val", "train_split", "train_tenth"]
_TRAIN_SCENES, _TEST_SCENES = 800, 400

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClassificationProbe(Evaluator):
  """Base class of the probes: data, views and the result.

  Subclasses define `_evaluate`. Options that are None take the published value,
  or a smaller one on scenes.

  Attributes:
    data: a data set with a training split (`datasets/registry.py`), or only
      test images.
    train: the training images, if `data` lacks a training split.
    view: see `global_features.with_view`; on scenes `encoder`.
    classes: the classes among which test images are scored, see `ZeroShot`;
      by default the training set's; for ImageNet-A and -R, their 200.
    count: test images, evenly spaced; all by default, 400 scenes.
    train_count: training images, evenly spaced; all by default, 800 scenes.
  """

  data: Data = "scenes"
  train: Data | None = None
  view: global_features.ViewName | None = None
  classes: Literal["all", "dataset", "present"] | None = None
  count: PositiveInt | None = None
  train_count: PositiveInt | None = None
  batch_size: PositiveInt = 64

  published_view: ClassVar[str] = "center"
  knows_frequencies: ClassVar[bool] = True  # of the training classes

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
      count=self._resolve(self.count, None, _TEST_SCENES),
      train_count=self._resolve(self.train_count, None, _TRAIN_SCENES),
      keep=self.classes,
    )

  def run(self, encoder: Encoder) -> Result:
    """Returns the probe's metrics."""
    return self.run_on(encoder, self._set)

  def run_on(self, encoder: Encoder, data: Splits) -> Result:
    """Like `run`, but on `data`."""
    view = self._resolve_view()
    encoder = global_features.with_view(encoder, view)
    estimate, protocol = self._evaluate(encoder, data)
    data_protocol = {**encoder.protocol(), **data.protocol(), "view": view}
    count, chance = len(data.scored), {}
    for name in estimate.metrics:
      k = 5 if name == "top5" else 1
      chance[name] = min(k, count) / count
      if self.knows_frequencies and name != "mean_per_class":
        chance[name] = max(chance[name], majority_accuracy(data, k=k))
    return Result.from_estimate(estimate, data_protocol | protocol, chance)

  def _list_features(
    self, encoder: Encoder, names: Sequence[str], *, train: bool = True
  ) -> list[tuple]:
    """`needed_features` of the test and, optionally, the training split."""
    encoder = global_features.with_view(encoder, self._resolve_view())
    splits = (self._set.train,) * train + (self._set.test,)
    return [(encoder, split, names) for split in splits]

  def _resolve_view(self) -> str:
    return self._resolve(self.view, self.published_view, "encoder")

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    raise NotImplementedError(f"{type(self).__name__} lacks _evaluate()")

  def _resolve(self, value: Any, published: Any, scenes: Any) -> Any:
    """The option's value, or its default for the data."""
    if value is not None:
      return value
    return scenes if is_scenes(self.data) else published


@dataclasses.dataclass(frozen=True)
class FeatureProbe(ClassificationProbe):
  """Base class of probes on one feature vector per image."""

  # See `global_features.embed`.
  feature: Literal["pooled", "cls", "mean"] = "pooled"

  def needed_features(self, encoder: Encoder) -> list[tuple]:
    """The feature of both splits; see `Evaluator`."""
    return self._list_features(encoder, [self.feature])

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

  _redraw: ClassVar[bool] = True  # see `crop_box`

  def _resolve_augment(
    self, *, steps: int, batch: int, images: int, is_capped: bool = False
  ) -> str:
    """Resolves `augment`; the default depends on the cost.

    `is_capped`: the published schedule would exceed the epoch limit.
    """
    name = type(self).__name__
    crops = steps * batch
    is_cached = self._is_cached(crops, images, is_capped=is_capped)
    augment = "cached" if is_cached else "crops"
    if self.augment is None and is_cached and not is_scenes(self.data):
      reason = ", as many as a shortened schedule has" if is_capped else ""
      log.warning(
        f"{name}: {steps} steps of {batch} crops are {crops // images} times "
        f"the {images} training images{reason}, so features are computed once; "
        "set augment='crops' to encode crops, or published=True for the full "
        "published schedule"
      )
    if augment == "crops":
      log.info(
        f"{name}: encodes {crops} random crops ({steps} steps of {batch}) of "
        f"{images} training images"
      )
    return augment

  def _is_cached(self, crops: int, images: int, *, is_capped: bool) -> bool:
    is_costly = is_capped or crops > probe.MAX_EPOCHS * images
    is_default = (is_costly or is_scenes(self.data)) and not self.published
    return self.augment == "cached" or (self.augment is None and is_default)

  def _batches(
    self, encoder: Encoder, train: ClassificationSet, augment: str, size: int
  ) -> probe.Batches:
    """Shuffled batches by step: `x` `[size, d]` and `label` `[size]`."""
    indices = probe.shuffled_batches(
      len(train.labels), batch_size=size, seed=self.seed
    )
    if augment == "cached":
      features = self._features(encoder, train)
      rows = {"x": features, "label": train.labels}
      return lambda step: {k: v[indices(step)] for k, v in rows.items()}

    def make_batch(step: int) -> probe.FeatureBatch:
      items = indices(step)
      label = train.labels[items]

      def crop_image(row: int) -> np.ndarray:
        image = train.images[int(items[row])]
        rng = np.random.default_rng((self.seed, step, row))
        size = encoder.preprocess.size
        return random_crop(image, size=size, rng=rng, redraw=self._redraw)

      images = LazySequence(crop_image, len(items))
      data = dataclasses.replace(train, images=images, labels=label)
      x = self._features(encoder, data, pixels="crops")
      return {"x": x, "label": label}

    return make_batch

  def _training_protocol(
    self, fitted: probe.FitResult, *, augment: str, batch_size: int
  ) -> dict[str, Any]:
    steps, uses_crops = len(fitted.losses), augment == "crops"
    crops = CROP_PROTOCOL + ("" if self._redraw else ", clamped to the image")
    return {
      "steps": steps,
      "train_batch": batch_size,
      "augment": crops if uses_crops else "none",
      "crops_encoded": steps * batch_size if uses_crops else 0,
      "last_loss": float(fitted.losses[-1]),
      "seed": self.seed,
    }


def split_for_selection(
  data: Splits, select: Select
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " h"] | None, str]:
  """Splits the training images for selecting a hyper-parameter.

  `val` selects on the test images, as the published protocols do; the reported
  metric is slightly optimistic. `train_split` trains on nine tenths of each
  class and selects on one tenth; `train_tenth` selects on a random tenth, the
  images that DINOv2's code draws. Returns the indices to train on, the
  indices to select on (None for the test images), and the protocol's text.
  """
  if select == "val":
    description = "the best on the test images themselves, as published"
    return np.arange(len(data.train.labels)), None, description
  count = len(data.train.labels)
  if select == "train_tenth":
    held_out = np.sort(permute_as_torch(count, max(1, count // 10)))
    train, part = np.setdiff1d(np.arange(count), held_out), "a random tenth"
  else:
    train, held_out = hold_out(data.train.labels)
    part = "a tenth of each class"
  if not (train.size and held_out.size):
    raise InputError(
      f"select={select!r}: {data.train.name} has one image per class, so "
      "none can be held out; use select='val'"
    )
  description = f"the best on {len(held_out)} training images, {part}"
  return train, held_out, description


def hold_out(
  labels: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " h"]]:
  """Sorted indices to train on and to hold out.

  Holds out one in ten images per class, none of a single-image class.
  """
  order = np.argsort(labels, kind="stable")
  counts = np.bincount(labels)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  position = np.arange(len(labels)) - starts
  size = np.repeat(counts, counts)
  # The middle of each ten, so that a class of two to nine holds out one too.
  is_held_out = (position % 10 == np.minimum(10, size) // 2) & (size > 1)
  return np.sort(order[~is_held_out]), np.sort(order[is_held_out])


def permute_as_torch(count: int, first: int) -> Int[np.ndarray, " first"]:
  """The first items of `torch.randperm(count)` on a CPU with seed 0.

  A Fisher-Yates shuffle by remainders of 32-bit Mersenne Twister draws.
  """
  draws = np.random.RandomState(0).randint(0, 2**32, first, np.uint32)
  items = np.arange(count)
  for i, draw in enumerate(draws.tolist()):
    j = i + draw % (count - i)
    items[[i, j]] = items[[j, i]]
  return items[:first]


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
  is_correct = ranks < 1
  items = np.arange(len(labels)) if groups is None else groups

  def mean_per_class(weights):
    counts = np.bincount(labels, weights[items])
    hits = np.bincount(labels, weights[items] * is_correct)
    is_present = counts > 0
    return {"mean_per_class": np.mean(hits[is_present] / counts[is_present])}

  hits = {"top1": is_correct, "top5": ranks < 5}
  return bootstrap.means(hits, groups=groups) | bootstrap.estimate(
    mean_per_class, int(items.max()) + 1
  )


def score_accuracies(
  scores: Float32[np.ndarray, "n c"], data: Splits
) -> Estimate:
  """`rank_accuracies` from class scores of the test images."""
  labels = data.test.labels
  is_correct = labels[:, None] == np.arange(scores.shape[1])
  scores = scores + data.penalty
  ranks = map_rows(ranking.ranks_of_scores, scores, is_correct)
  return rank_accuracies(ranks, labels)


def majority_accuracy(data: Splits, *, k: int) -> float:
  """Top-k accuracy of always predicting the most frequent training classes.

  Averaged over the ways to break ties between equally frequent classes.
  """
  train_counts, test_counts = (
    np.bincount(s.labels, minlength=data.classes)[list(data.scored)]
    for s in (data.train, data.test)
  )
  k = min(k, len(data.scored))
  threshold = np.sort(train_counts)[-k]
  above, tied = train_counts > threshold, train_counts == threshold
  hits = test_counts[above].sum() + (k - above.sum()) * test_counts[tied].mean()
  return float(hits / len(data.test.labels))


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
  height: int, width: int, rng: np.random.Generator, *, redraw: bool = True
) -> tuple[int, int, int, int]:
  """Random crop (left, top, right, bottom) in pixels.

  Without `redraw`, the first draw is clamped to the image, as in BYOL and MAE.
  With it, as in torchvision, draws are repeated until one fits; after ten, the
  box is a center crop at the nearest allowed aspect ratio.
  """
  area = height * width
  for _ in range(_ATTEMPTS):
    target_area = area * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = round(math.sqrt(target_area * ratio))
    h = round(math.sqrt(target_area / ratio))
    if not redraw:
      w, h = min(w, width), min(h, height)
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return left, top, left + w, top + h
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_crop(
  image: UInt8[np.ndarray, "h w 3"],
  *,
  size: int,
  rng: np.random.Generator,
  redraw: bool = True,
) -> UInt8[np.ndarray, "s s 3"]:
  """Random resized crop of `size` x `size`, flipped with probability 0.5.

  Inception crop (Szegedy et al. 2015) with torchvision's constants: 8 to 100 %
  of the area, log-uniform aspect ratio in 3/4..4/3, antialiased bicubic
  resampling. `redraw`: see `crop_box`.
  """
  box = crop_box(*image.shape[:2], rng, redraw=redraw)
  crop = PIL.Image.fromarray(image).crop(box)
  crop = np.asarray(crop.resize((size, size), PIL.Image.Resampling.BICUBIC))
  return crop[:, ::-1] if rng.random() < 0.5 else crop
