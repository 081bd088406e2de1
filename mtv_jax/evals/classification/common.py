"""What the probes of classification have in common: data, views, selection."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.classification import zero_shot
from mtv_jax.evals.core import global_features, ranking
from mtv_jax.evals.core.base import Evaluator
from mtv_jax.evals.core.examples import ClassificationSet, Data
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.datasets.splits import Splits, hold_out
from mtv_jax.utils.errors import check_choice

SELECTIONS = ("val", "train_split")
_TRAIN_SCENES, _TEST_SCENES = 800, 400
_ROWS = 4096  # ranked at a time

# Not "none", which a command line takes for "no value given".
AUGMENTS = ("cached", "crops")
# Passes over the training images that crops are encoded for unless asked. The
# published schedules make 10 (DINOv2) and 90 (MAE) of ImageNet's.
_PASSES = 100

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Classification(Evaluator):
  """Options of every probe of classification.

  Attributes:
    data: with a training split, see `datasets/registry.py`; or the images to
      test on.
    train: the images to train on, where `data` does not have them.
    view: `center`, `squash_center` or `encoder`, see `global_features.view`;
      by default what the protocol publishes, and for scenes `encoder`.
    count: test images to use, evenly spaced; all by default, of scenes 400.
    train_count: training images, likewise; of scenes 800.
    batch_size: images a step of the encoder.
  """

  data: Data = "scenes"
  train: Data | None = None
  view: str | None = None
  count: int | None = None
  train_count: int | None = None
  batch_size: int = 64

  published_view: ClassVar[str] = "center"

  def __post_init__(self):
    name = type(self).__name__
    if self.view is not None:
      check_choice(f"{name}: view", self.view, global_features.VIEWS)

  @functools.cached_property
  def _set(self) -> Splits:
    few = functools.partial(self._resolve, published=None)
    return registry.open_splits(
      self.data,
      train=self.train,
      count=few(self.count, scenes=_TEST_SCENES),
      train_count=few(self.train_count, scenes=_TRAIN_SCENES),
    )

  def prepare(self) -> None:
    """Reads names and labels, and keeps them."""
    _ = self._set

  def _resolve(self, value: Any, *, published: Any, scenes: Any) -> Any:
    """An option: as given, else as published, else small for the scenes."""
    if value is not None:
      return value
    return scenes if is_scenes(self.data) else published

  def _view_name(self) -> str:
    return self._resolve(
      self.view, published=self.published_view, scenes="encoder"
    )

  def _view(self, encoder: Encoder) -> Encoder:
    return global_features.view(encoder, self._view_name())

  def _augmentation(
    self, augment: str | None, *, steps: int, batch: int, images: int
  ) -> str:
    """`cached` or `crops`, as given or else what costs a sensible time."""
    name = type(self).__name__
    encoded = steps * batch
    small = encoded > _PASSES * images
    if augment is None:
      published = "cached" if small else "crops"
      augment = self._resolve(None, published=published, scenes="cached")
      if small and not is_scenes(self.data):
        log.warning(
          "%s: %d steps of %d crops are %d times the %d training images, so "
          "features are computed once (augment='cached'); augment='crops' "
          "asks for crops all the same",
          *(name, steps, batch, encoded // images, images),
        )
    if augment == "crops":
      log.info(
        "%s: encodes %d random crops (%d steps of %d) of %d training images",
        *(name, encoded, steps, batch, images),
      )
    return augment

  def _common(self, encoder: Encoder) -> dict[str, Any]:
    """The protocol of data and features."""
    return {
      **encoder.protocol(),
      **self._set.protocol(),
      "view": self._view_name(),
    }


@dataclasses.dataclass(frozen=True)
class OneVector(Classification):
  """Options of the probes that take one vector an image.

  Attributes:
    feature: `pooled`, `cls` or `mean`, see `global_features.embed`.
  """

  feature: str = "pooled"

  def __post_init__(self):
    super().__post_init__()
    name = type(self).__name__
    check_choice(f"{name}: feature", self.feature, global_features.FEATURES)

  def _embed(
    self, encoder: Encoder, part: ClassificationSet
  ) -> Float32[np.ndarray, "n d"]:
    return global_features.embed(
      encoder, part, feature=self.feature, batch_size=self.batch_size
    )

  def _common(self, encoder: Encoder) -> dict[str, Any]:
    return {**super()._common(encoder), "feature": self.feature}


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which images a choice (of a rate, of C) is made on.

  Attributes:
    train: indices into the training set, to train on.
    chosen_on: indices to choose by, into the training set for `train_split`
      and else into the test set.
    how: a sentence for the protocol.
  """

  train: Int[np.ndarray, " t"]
  chosen_on: Int[np.ndarray, " h"]
  how: str


def selection(data: Splits, select: str) -> Selection:
  """Where to choose.

  Args:
    data: the splits.
    select: `val` chooses by the figure that is reported, on the test images,
      as published protocols do, which flatters it a little; `train_split`
      trains on nine tenths of each class and chooses on the others.
  """
  check_choice("select", select, SELECTIONS)
  if select == "val":
    return Selection(
      np.arange(len(data.train.labels)),
      np.arange(len(data.test.labels)),
      "the best on the test images themselves, as published",
    )
  kept, out = hold_out(data.train.labels)
  if not out.size:
    raise ValueError(
      f"select='train_split': {data.train.name} has one image a class, so none "
      "can be held out; use select='val'"
    )
  return Selection(
    kept, out, f"the best on {len(out)} training images, a tenth of each class"
  )


def accuracies(
  scores: Float32[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
  """Top-1, top-5 and mean-per-class accuracy of scores of each class."""
  own = labels[:, None] == np.arange(scores.shape[1])
  found = [
    np.asarray(
      ranking.ranks_of_scores(scores[s : s + _ROWS], own[s : s + _ROWS])
    )
    for s in range(0, len(scores), _ROWS)
  ]
  return zero_shot.accuracies(np.concatenate(found), labels)


def chance(classes: int) -> dict[str, float]:
  """What guessing gets, of `accuracies`."""
  return {
    "top1": 1 / classes,
    "top5": min(5, classes) / classes,
    "mean_per_class": 1 / classes,
  }
