"""Training and test splits of classification data."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Int

from mtv_jax.evals.core.examples import ClassificationSet
from mtv_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Splits:
  """Disjoint images to train and to test a probe on, of the same classes."""

  train: ClassificationSet
  test: ClassificationSet
  classes: int

  def protocol(self) -> dict[str, Any]:
    """For JSON."""
    return {
      "data": self.test.name,
      "data_hash": self.test.digest,
      "images": len(self.test.images),
      "train_data": self.train.name,
      "train_data_hash": self.train.digest,
      "train_images": len(self.train.images),
      "classes": self.classes,
    }


def match_splits(train: ClassificationSet, test: ClassificationSet) -> Splits:
  """Both sets with labels among the classes of `train`.

  Raises:
    InputError: for classes that don't agree, or one set given twice.
  """
  both_scenes = train.name == test.name == "scenes"
  path = os.path.realpath(test.name)
  if os.path.realpath(train.name) == path and not both_scenes:
    raise InputError(
      f"train and test are both {path}: a probe would be tested on its "
      "training images"
    )
  if train.ids is None or test.ids is None:
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return Splits(train, test, max(classes, len(train.classes or ())))
  index = {key: i for i, key in enumerate(train.ids)}
  missing = [key for key in test.ids if key not in index]
  if missing:
    raise InputError(
      f"{len(missing)} of {len(test.ids)} classes of {test.name} are not in "
      f"{train.name}, such as {missing[0]!r}. Is train= another data set, or "
      "unpacked in part?"
    )
  labels = np.asarray([index[key] for key in test.ids], np.int32)[test.labels]
  test = dataclasses.replace(
    test, labels=labels, ids=train.ids, classes=train.classes
  )
  return Splits(train, test, len(train.ids))


def hold_out(
  labels: Int[np.ndarray, " n"], *, every: int = 10
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " h"]]:
  """Sorted indices of a training set to train on, and to hold out.

  One of each `every` images of a class is held out, none of a class with one.
  """
  order = np.argsort(labels, kind="stable")
  counts = np.bincount(labels)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  rank = np.arange(len(labels)) - starts
  total = np.repeat(counts, counts)
  # The middle one of each ten, so that a class of two to nine gives one too.
  out = (rank % every == np.minimum(every, total) // 2) & (total > 1)
  return np.sort(order[~out]), np.sort(order[out])
