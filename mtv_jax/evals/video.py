"""Video object segmentation by label propagation (DAVIS 2017).

DINO's protocol (Caron et al. 2021, section 4.2.2), after Jabri et al. 2020:
nothing is trained. The first frame's masks are propagated from frame to frame.
With f the normalised patch tokens of the last block, the labels of patch q are

    s(q) = sum_p softmax_p(cos(f_q, f_p) / 0.1) s(p)

over the 5 most similar patches p (and patches that tie with the fifth), in the
first and the 7 preceding frames, within 12 patches of q along each axis. Each
object's scores are scaled to 0..1 per frame; a pixel gets the object with the
highest score.

The metrics are DAVIS's (Perazzi et al. 2016, section 5), as in the official
evaluation: J is the IoU of an object's masks, F the F-measure of their
boundaries. A boundary pixel matches if the other boundary has a pixel within
0.8 % of the image diagonal, rounded up. Scores are averaged over frames, except
the first and the last, then over objects; recall is the fraction of frames
above 0.5.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Bool, Float, Float32, Float64, UInt8

from mtv_jax.config.options import NonNegativeInt, PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import bootstrap, dense, resizing
from mtv_jax.evals.core.base import Evaluator, Result, preprocess_protocol
from mtv_jax.evals.core.examples import (
  Data,
  LazySequence,
  Video,
  VideoSet,
  select_images,
  subsample,
)
from mtv_jax.evals.datasets import registry
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError

_SIZE, _STEP = 480, 64  # shorter side; divisor of the longer side
_PATCH = 16  # of the published encoders
_NEIGHBOURHOOD = 12
_CHUNK = 32  # frames whose features are in memory
_ROWS = 512  # patches whose similarities are in memory
_TITLES = ("last frame", "true objects", "predicted objects")


@dataclasses.dataclass(frozen=True)
class VideoSegmentation(Evaluator):
  """Video object segmentation by label propagation: J, F and their recalls.

  None means the published value for DAVIS and a small value for scenes.

  Attributes:
    size: shorter side of the encoded frames; the longer side is rounded down
      to a multiple of 64. 480 as published; if the patch size doesn't divide
      480 or 64, the published number of patches. For scenes the encoder's size.
    frames: number of preceding context frames, besides the first.
    top_k: number of most similar patches that labels come from.
    neighbourhood: largest distance to these patches along an axis, in patches;
      0 is unlimited. 12 for DAVIS's 30 rows, in proportion for scenes.
    temperature: softmax temperature of the cosines.
    layer, norm: block whose patch tokens are compared, and whether the final
      norm is applied.
    count: videos to use, evenly spaced; all by default, 16 scenes.
    batch_size: frames per encoder batch.
  """

  data: Data = "scenes"
  size: PositiveInt | None = None
  frames: PositiveInt = 7
  top_k: PositiveInt = 5
  neighbourhood: NonNegativeInt | None = None
  temperature: PositiveFloat = 0.1
  layer: int = -1
  norm: Literal["none", "final"] = "final"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 8
  pictures: NonNegativeInt = 0  # Videos on the sheet.

  @functools.cached_property
  def _set(self) -> VideoSet:
    return registry.open_videos(self.data, count=self.count)

  def run(self, encoder: Encoder) -> Result:
    """Returns metrics; chance copies the first masks to every frame."""
    data, depth = self._set, encoder.spec.image.depth
    block = dense.matched_block(self.layer, norm=self.norm, depth=depth)
    channels = 1 + max(video.objects for video in data.videos)
    sheet_indices = subsample(range(len(data.videos)), self.pictures or 1)
    scores, copy_scores, groups, rows, sizes = [], [], [], [], set()
    for i, video in enumerate(data.videos):
      size = self._input_size(encoder, video.frames[0].shape[:2])
      sizes.add(size)
      truth = [video.masks[t] for t in range(1, len(video.masks) - 1)]
      copied = [video.masks[0]] * len(truth)
      _check_sizes(video, truth)
      predicted = list(self._predict(encoder, video, size, block, channels))
      for results, maps in ((scores, predicted), (copy_scores, copied)):
        results.append(score_video(truth, maps, objects=video.objects))
      groups += [i] * video.objects
      if self.pictures and i in sheet_indices:
        rows.append(_draw_row(video, truth, predicted))
    values, copied = (
      {name: np.concatenate([s[name] for s in results]) for name in results[0]}
      for results in (scores, copy_scores)
    )
    estimate = bootstrap.means(values, groups=np.asarray(groups))
    protocol = self._protocol(encoder, sizes, len(groups))
    chance = {name: float(np.mean(x)) for name, x in copied.items()}
    sheets = {}
    if rows:
      sheets["video_segmentation"] = plots.stack_rows(rows, _TITLES)
    return Result.from_estimate(estimate, protocol, chance, sheets=sheets)

  def _input_size(
    self, encoder: Encoder, shape: tuple[int, int]
  ) -> tuple[int, int]:
    """Height and width of the encoded frames."""
    image = encoder.spec.image
    patch = image.patch_size
    if self.size is None and self._set.kind == "scenes":
      side = -(-encoder.preprocess.size // patch) * patch
      return side, side
    # If the patch size doesn't divide the pixels, keep the published grid.
    short, step = _SIZE, _STEP
    if short % patch or step % patch:
      short, step = (side // _PATCH * patch for side in (short, step))
    short = self.size or short
    long = max(shape) * short // min(shape) // step * step
    size = (short, max(long, step))
    size = size if shape[0] <= shape[1] else size[::-1]
    image.grid_of(*size)
    return size

  def _resolve_neighbourhood(self, grid: tuple[int, int]) -> int:
    if self.neighbourhood is not None or self._set.kind != "scenes":
      option = self.neighbourhood
      return _NEIGHBOURHOOD if option is None else option
    return max(1, round(min(grid) * _NEIGHBOURHOOD / (_SIZE // _PATCH)))

  def _predict(
    self, encoder: Encoder, video: Video, size: tuple, block: int, channels: int
  ) -> Iterator[UInt8[np.ndarray, "h w"]]:
    """Object maps of the frames between the first and the last."""
    grid = encoder.spec.image.grid_of(*size)
    first_mask = video.masks[0]
    small_mask = _resize_nearest(first_mask, grid)
    labels = np.eye(channels, dtype=np.float32)[small_mask]
    soft_labels = propagate(
      self._features(encoder, video, size, block),
      labels,
      frames=self.frames,
      top_k=self.top_k,
      neighbourhood=self._resolve_neighbourhood(grid),
      temperature=self.temperature,
    )
    for scores in soft_labels:
      labels = np.asarray(_argmax_map(scores, size))
      yield _resize_nearest(labels, first_mask.shape)

  def _features(
    self, encoder: Encoder, video: Video, size: tuple[int, int], block: int
  ) -> Iterator[Float32[np.ndarray, "h w d"]]:
    """Patch tokens of each frame except the last."""
    options = {"norm": self.norm, "batch_size": self.batch_size}

    def read(t: int) -> np.ndarray:
      frame, linear = video.frames[t], cv2.INTER_LINEAR
      return cv2.resize(frame, size[::-1], interpolation=linear)

    images = LazySequence(read, len(video.frames) - 1)
    for start in range(0, len(images), _CHUNK):
      chunk = range(start, min(start + _CHUNK, len(images)))
      frames = select_images(images, chunk)
      yield from dense.features(encoder, frames, (block,), **options)

  def _protocol(
    self, encoder: Encoder, sizes: set[tuple[int, int]], objects: int
  ) -> dict[str, Any]:
    data = self._set
    grids = [encoder.spec.image.grid_of(*size) for size in sorted(sizes)]
    return {
      **encoder.protocol(),
      "dataset": {"davis": "DAVIS 2017 val"}.get(data.kind, data.kind),
      "data": data.name,
      "data_hash": data.digest,
      "videos": len(data.videos),
      "objects": objects,
      "input_size": [list(size) for size in sorted(sizes)],
      "preprocess": preprocess_protocol(
        encoder, resize="shorter side", interpolation="bilinear"
      ),
      "layer": self.layer,
      "norm": self.norm,
      "similarity": "cosine, float32, highest matmul precision",
      "frames": self.frames,
      "top_k": self.top_k,
      "neighbourhood": [self._resolve_neighbourhood(grid) for grid in grids],
      "temperature": self.temperature,
      "ties": "top-k: all patches equal to the last one",
      "scored_frames": "all but the first and the last",
      "averaging": "frames, then objects",
      "chance": "a baseline: the first frame's masks, copied to every frame",
    }


def propagate(
  features: Iterable[Float32[np.ndarray, "h w d"]],
  first: Float32[np.ndarray, "h w c"],
  *,
  frames: int,
  **options: Any,
) -> Iterator[Float32[Array, "h w c"]]:
  """Yields soft labels of the second and later frames.

  `options` are `top_k`, `neighbourhood` and `temperature`.
  """
  h, w, c = first.shape
  keys = labels = None
  for t, feature in enumerate(features):
    query = jnp.asarray(normalize(feature).reshape(h * w, -1))
    if keys is None:
      # Slot 0 is the first frame; slots 1.. are a ring of preceding frames.
      keys = jnp.zeros((frames + 1, *query.shape)).at[0].set(query)
      labels = jnp.zeros((frames + 1, h * w, c))
      labels = labels.at[0].set(first.reshape(h * w, c))
      continue
    valid = jnp.arange(frames + 1) < t
    soft = _propagate_frame(query, keys, labels, valid, grid=(h, w), **options)
    slot = 1 + (t - 1) % frames
    keys, labels = keys.at[slot].set(query), labels.at[slot].set(soft)
    yield soft.reshape(h, w, c)


@functools.partial(
  jax.jit, static_argnames=("grid", "top_k", "neighbourhood", "temperature")
)
def _propagate_frame(
  query: Float[Array, "n d"],
  keys: Float[Array, "f n d"],
  labels: Float[Array, "f n c"],
  valid: Bool[Array, " f"],
  *,
  grid: tuple[int, int],
  top_k: int,
  neighbourhood: int,
  temperature: float,
) -> Float[Array, "n c"]:
  """Labels of a frame's patches from the valid frames' labels."""
  rows, columns = (x.reshape(-1) for x in jnp.indices(grid))
  near = jnp.ones((len(query),) * 2, bool)
  if neighbourhood:
    for axis in (rows, columns):
      near &= abs(axis[:, None] - axis[None]) <= neighbourhood

  def average_labels(row):
    patch, is_near = row  # [D], [N]
    scores = jnp.einsum("d,fmd->fm", patch, keys)
    scores = jnp.where(is_near & valid[:, None], scores, -jnp.inf)  # [F, N]
    top, _ = jax.lax.top_k(scores.ravel(), min(top_k, scores.size))
    weights = jnp.exp((scores - top[0]) / temperature)
    # As in DINO's code, patches that tie with the last one count too.
    weights = jnp.where(scores >= top[-1], weights, 0)
    return jnp.einsum("fm,fmc->c", weights / weights.sum(), labels)

  # In blocks of patches: all [N, F, N] scores are 1.3 GB at patch size 8.
  with jax.default_matmul_precision("highest"):
    return jax.lax.map(average_labels, (query, near), batch_size=_ROWS)


@functools.partial(jax.jit, static_argnames="size")
def _argmax_map(scores: Float[Array, "h w c"], size: tuple[int, int]) -> Array:
  """uint8 argmax over channels, after scaling each channel to 0..1."""
  scores = resizing.resize(scores, size, method="bilinear")
  low, high = scores.min(axis=(0, 1)), scores.max(axis=(0, 1))
  # A channel without a patch stays zero.
  span = jnp.where(high > low, high - low, 1)
  scaled = jnp.where(high > 0, (scores - low) / span, scores)
  return jnp.argmax(scaled, axis=-1).astype(jnp.uint8)


def _resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  nearest = PIL.Image.Resampling.NEAREST
  return np.asarray(PIL.Image.fromarray(labels).resize(size[::-1], nearest))


def _check_sizes(video: Video, truth: list[UInt8[np.ndarray, "h w"]]) -> None:
  for t, labels in enumerate(truth, start=1):
    if labels.shape != video.masks[0].shape:
      raise InputError(
        f"{video.name}: the mask of frame {t} is {list(labels.shape)}, but "
        f"the first is {list(video.masks[0].shape)}; expected one size"
      )


def _draw_row(video: Video, truth: list, predicted: list) -> np.ndarray:
  """The last scored frame, its true and its predicted objects."""
  colours = np.zeros((256, 3), np.uint8)
  colours[1 : 1 + video.objects] = plots.palette(video.objects)
  maps = [colours[labels[-1]] for labels in (truth, predicted)]
  frame = video.frames[len(truth)]
  return plots.image_with_maps(frame, maps, height=plots.THIRD)


_TOLERANCE = 0.008  # of the diagonal
_RECALL_SCORE = 0.5


def region_iou(
  truth: Bool[np.ndarray, "h w"], predicted: Bool[np.ndarray, "h w"]
) -> float:
  """J: intersection over union; 1 if both masks are empty."""
  union = np.count_nonzero(truth | predicted)
  return np.count_nonzero(truth & predicted) / union if union else 1.0


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
  """Pixels that differ from the pixel to the right, below or below right.

  The mask is edge-padded at the last row and column.
  """
  padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
  right, below = padded[:-1, 1:], padded[1:, :-1]
  return (mask != right) | (mask != below) | (mask != padded[1:, 1:])


def boundary_f(
  truth: Bool[np.ndarray, "h w"], predicted: Bool[np.ndarray, "h w"]
) -> float:
  """F: harmonic mean of the boundaries' precision and recall.

  1 if neither mask has a boundary, 0 if only one has.
  """
  lines = [boundary(mask) for mask in (predicted, truth)]
  counts = [np.count_nonzero(line) for line in lines]
  if not all(counts):
    return float(not any(counts))
  radius = int(np.ceil(_TOLERANCE * np.hypot(*truth.shape)))
  y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
  disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
  near = [cv2.dilate(line.view(np.uint8), disk) > 0 for line in lines]
  precision = np.count_nonzero(lines[0] & near[1]) / counts[0]
  recall = np.count_nonzero(lines[1] & near[0]) / counts[1]
  total = precision + recall
  return 2 * precision * recall / total if total else 0.0


def score_video(
  truth: Sequence[UInt8[np.ndarray, "h w"]],
  predicted: Sequence[UInt8[np.ndarray, "h w"]],
  *,
  objects: int,
) -> dict[str, Float64[np.ndarray, " {objects}"]]:
  """Scores of each object of a video, by metric.

  `truth` and `predicted` are maps of the scored frames; objects are 1, 2, ...
  """
  j, f = np.empty((2, objects, len(truth)))
  for t, maps in enumerate(zip(truth, predicted, strict=True)):
    for k in range(objects):
      masks = [labels == k + 1 for labels in maps]
      j[k, t], f[k, t] = region_iou(*masks), boundary_f(*masks)
  return {
    "j_and_f": (j.mean(axis=1) + f.mean(axis=1)) / 2,
    "j": j.mean(axis=1),
    "f": f.mean(axis=1),
    "j_recall": (j > _RECALL_SCORE).mean(axis=1),
    "f_recall": (f > _RECALL_SCORE).mean(axis=1),
  }
