"""PCA of patch features, shown as colours.

Three principal components over all patches of a few images, so that equal
colours mean equal features across images (as in Oquab et al. 2023, Fig. 1).
With `foreground=threshold`, the first component, thresholded at its mean,
separates the foreground, whose PCA is shown. The metric, the variance explained
by three components, is descriptive: neither higher nor lower is better.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float32

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import base, bootstrap, examples, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.examples import Data, ImageSet
from mtv_jax.evals.datasets import registry
from mtv_jax.utils import plots

Patches = Float32[np.ndarray, "n h w d"]
Mask = Bool[np.ndarray, "n h w"]


@dataclasses.dataclass(frozen=True)
class PatchPca(Evaluator):
  """Principal components of patch features.

  Attributes:
    data: see `datasets/registry.py`, or any folder with JPEGs under it; needs
      only images.
    count: number of images in the joint PCA, evenly spaced.
    layer: block whose output is used, before the final norm; None for the
      final output, after it.
    size: side of the encoded squares, for a finer grid than the encoder's
      default.
    foreground: `all` patches, or patches above a `threshold`.
  """

  title = "Patch PCA"
  main = ()  # no direction is better

  data: Data = "scenes"
  count: PositiveInt = 8
  layer: int | None = None
  size: PositiveInt | None = None
  foreground: Literal["all", "threshold"] = "all"
  pictures: NonNegativeInt = 0
  batch_size: PositiveInt = 16

  @functools.cached_property
  def _set(self) -> ImageSet:
    return registry.open_images(self.data, count=self.count)

  def run(self, encoder: Encoder) -> Result:
    """Returns the explained variance, and the sheet `pca`."""
    data = self._set
    if encoder.preprocess.resize == "native":
      encoder = encoder.with_preprocess(encoder.preprocess.squashed())
    patches = self._encode(encoder, data.images)
    mask = np.ones(patches.shape[:3], bool)
    if self.foreground == "threshold":
      mask = find_foreground(patches)
    pca = principal_components(patches, mask=mask)
    sheets = {}
    if self.pictures:
      colours = component_colours(pca.components, mask)
      rows = [
        self._make_row(encoder, data.images[i], pixels)
        for i, pixels in enumerate(colours[: self.pictures])
      ]
      titles = ("image", "first 3 components")
      sheets["pca"] = plots.image_grid(rows, titles=titles)
    protocol = {
      **encoder.protocol(),
      **data.protocol(),
      "input": "as preprocessed" if self.size is None else [self.size] * 2,
      "grid": list(patches.shape[1:3]),
      "layer": "last" if self.layer is None else self.layer,
      "final_norm": self.layer is None,
      "foreground": self.foreground,
      "patches": int(mask.sum()),
    }
    if self.size is not None:
      protocol |= {
        "input_size": [self.size, self.size],
        "preprocess": base.preprocess_protocol(
          encoder,
          resize="squash",
          size=self.size,
          crop="none",
          interpolation="bicubic, antialiased (Pillow)",
        ),
      }
    name, error = "explained_by_3", share_error(patches, mask=mask)
    return Result(
      {name: float(pca.share.sum())},
      protocol,
      errors={} if error is None else {name: error},
      sheets=sheets,
    )

  def _make_row(
    self, encoder: Encoder, image: np.ndarray, colours: np.ndarray
  ) -> list[np.ndarray]:
    """Image and colours, resized to the image if it was encoded whole."""
    if self.size is not None or encoder.preprocess.resize == "squash":
      shape = image.shape[1::-1]
      grid = PIL.Image.fromarray(colours)
      colours = np.asarray(grid.resize(shape, PIL.Image.Resampling.NEAREST))
    return [image, colours]

  def _encode(self, encoder: Encoder, images: Sequence[np.ndarray]) -> Patches:
    method = encoder.image
    if self.size is not None:
      shape = (self.size, self.size)
      images = examples.open_items(
        images, lambda x: np.asarray(PIL.Image.fromarray(x).resize(shape))
      )
      method = encoder.dense
    if self.layer is None:
      out = method(images, outputs=("patches",), batch_size=self.batch_size)
      return out.patches
    layers = (self.layer,)
    out = method(images, layers=layers, outputs=(), batch_size=self.batch_size)
    return out.layers[self.layer]


@dataclasses.dataclass(frozen=True)
class Components:
  """Components of all patches, and their explained variance."""

  components: Float32[np.ndarray, "n h w c"]
  share: Float32[np.ndarray, " c"]  # explained variance ratio, decreasing


def principal_components(
  patches: Patches, *, mask: Mask, count: int = 3
) -> Components:
  """Projects patches on the principal components of the patches in `mask`.

  Signs are arbitrary; each component's largest loading is made positive.
  Components beyond the number of features are zero.
  """
  rows = patches[mask].astype(np.float64)
  ranking.check_finite(patches=rows)
  mean = rows.mean(axis=0)
  values, vectors = np.linalg.eigh(_covariance(rows))
  values, vectors = values[::-1].clip(0), vectors[:, ::-1][:, :count]
  largest = np.argmax(np.abs(vectors), axis=0)
  vectors *= np.sign(vectors[largest, np.arange(vectors.shape[1])])
  missing = count - vectors.shape[1]
  components = (patches.astype(np.float64) - mean) @ vectors
  share = values[:count] / max(values.sum(), 1e-300)
  return Components(
    np.pad(components, [(0, 0)] * 3 + [(0, missing)]).astype(np.float32),
    np.pad(share, (0, missing)).astype(np.float32),
  )


def _covariance(rows: np.ndarray) -> np.ndarray:
  """Covariance `[d, d]` of features `[m, d]`."""
  centred = rows - rows.mean(axis=0)
  return centred.T @ centred / len(rows)


def share_error(patches: Patches, *, mask: Mask) -> float | None:
  """Jackknife error over images of the variance of three components.

  None if fewer than two images have patches in `mask`.
  """
  images = np.flatnonzero(mask.any(axis=(1, 2)))
  if len(images) < 2:
    return None
  shares = []
  for left_out in images:
    remaining = images[images != left_out]
    rows = patches[remaining][mask[remaining]].astype(np.float64)
    values = np.linalg.eigvalsh(_covariance(rows)).clip(0)
    shares.append(values[-3:].sum() / max(values.sum(), 1e-300))
  return bootstrap.jackknife_error(np.array(shares))


def find_foreground(patches: Patches) -> Mask:
  """Foreground mask: patches on one side of the first component's mean.

  The component's sign is arbitrary. We take the side that is rarer at image
  borders, since objects tend to be central (our choice).
  """
  all_patches = np.ones(patches.shape[:3], bool)
  first_pc = principal_components(patches, mask=all_patches, count=1).components
  is_above = first_pc[..., 0] > 0
  border = np.ones(patches.shape[1:3], bool)
  border[1:-1, 1:-1] = False
  if is_above[:, border].mean() > is_above[:, ~border].mean():
    is_above = ~is_above
  return is_above if is_above.any() else all_patches


def component_colours(components: Patches, mask: Mask) -> np.ndarray:
  """Three components per patch as RGB, on one scale for all images.

  Each component is scaled from its 1st to its 99th percentile over patches in
  `mask`; patches outside are black.
  """
  if not mask.any():
    return np.zeros(components.shape, np.uint8)
  low, high = np.percentile(components[mask], (1, 99), axis=0)
  unit = (components - low) / np.maximum(high - low, 1e-12)
  colours = np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)
  return np.where(mask[..., None], colours, np.uint8(0))
