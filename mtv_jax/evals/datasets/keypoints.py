"""Pictures in pairs, with key points that mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from mtv_jax.evals.core import examples


@dataclasses.dataclass(frozen=True)
class KeyPointPair:
  """Two pictures of one category and the points that both show.

  Coordinates are (x, y) in pixels of the picture as it is stored.

  Attributes:
    category: what both show.
    viewpoint: how much the viewpoint differs (0 easy, 1 medium, 2 hard), or
      None where the data does not say.
    first, second: indices of the pictures.
    first_points, second_points: the key points.
    second_box: (x0, y0, x1, y1) of the thing in the second picture.
    first_side, second_side: the pictures' longer sides.
  """

  category: str
  viewpoint: int | None
  first: int
  second: int
  first_points: Float64[np.ndarray, "k 2"]
  second_points: Float64[np.ndarray, "k 2"]
  second_box: Float64[np.ndarray, "4"]
  first_side: int
  second_side: int


@dataclasses.dataclass(frozen=True)
class KeyPointPairs:
  """A data set of them.

  Attributes:
    name: what it is, for the protocol.
    layout: `spair` or `scenes`.
    images: the pictures.
    pairs: in a fixed order.
    digest: hash of the pairs and the files.
    about: what else the figures depend on.
  """

  name: str
  layout: str
  images: examples.Images
  pairs: tuple[KeyPointPair, ...]
  digest: str
  about: Mapping[str, Any]
