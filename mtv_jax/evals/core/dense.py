"""Dense features of a frozen encoder, batched for probes and matching.

A `PaddedView` resizes an image to the input size and pads it on all sides, with
the encoder's mean colour, to a multiple of the patch size. Predictions are
upsampled over the padded input and then cropped, so that patches and pixels
stay aligned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import block_index
from mtv_jax.evals.core import probe, resizing
from mtv_jax.evals.core.global_features import final_norm
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.grouping import Grouper

Encode = Callable[[list[np.ndarray]], Float32[np.ndarray, "n h w c"]]
# An incomplete batch runs after this many batches' worth of later items.
_MAX_WAIT = 8
# The encoder's input, and its per-pixel labels or depth.
LabelledInput = tuple[np.ndarray, np.ndarray]


def features(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  blocks: Sequence[int],
  *,
  norm: str,
  cls: bool = False,
  batch_size: int,
) -> Float32[np.ndarray, "n h w c"]:
  """Patch tokens of blocks (0-based), concatenated along the channels.

  Images are in 0..255 and have one size, divisible by the patch size. `norm`
  "final" applies the encoder's final norm, if any, to the tokens of all blocks,
  "none" to none of them. `cls` appends each block's CLS token to its patches.
  """
  last = encoder.spec.image.depth - 1
  # The last block's normalised tokens come from the encoder itself.
  raw_blocks = tuple(i for i in blocks if norm == "none" or i != last)
  outputs = ("patches", "prefix") if cls else ("patches",)
  out = encoder.dense(
    images,
    layers=raw_blocks,
    outputs=outputs if norm == "final" else (),
    batch_size=batch_size,
  )
  columns = []
  for i in blocks:
    patches, prefix = out.patches, out.prefix
    if i in raw_blocks:
      patches, prefix = out.layers[i], out.prefix_layers.get(i)
    tokens = [patches]
    if cls:
      tokens.append(np.broadcast_to(prefix[:, None, None, 0], patches.shape))
    if i in raw_blocks and norm == "final":
      tokens = [final_norm(encoder, x) for x in tokens]
    columns += tokens
  return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)


def matched_block(layer: int, *, norm: str, depth: int) -> int:
  """0-based index of the block whose tokens are compared.

  Raises ConfigError if `norm` is "final" for a block before the last.
  """
  block = block_index(layer, depth)
  if norm == "final" and block != depth - 1:
    raise ConfigError(
      f"norm='final' with layer={layer}: the final norm follows the last block "
      f"only, -1 or {depth - 1}; use norm='none'"
    )
  return block


@dataclasses.dataclass(frozen=True)
class PaddedView:
  """Resized and padded encoder input for images of one size."""

  size: tuple[int, int]  # rows and columns of the image
  input_size: tuple[int, int]  # after resizing, before padding
  patch: int
  resize: str = "bilinear"  # how predictions are resized, see `resizing`
  # Mean of the encoder's normalisation, in 0..1; padding normalises to zero.
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)

  @property
  def padded(self) -> tuple[int, int]:
    """Rows and columns with padding."""
    h, w = (-(-side // self.patch) * self.patch for side in self.input_size)
    return h, w

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    return self.padded[0] // self.patch, self.padded[1] // self.patch

  def pad(self, image: Float[np.ndarray, "h w 3"]) -> np.ndarray:
    """Resizes and pads an image in 0..255, to float32."""
    if image.shape[:2] != self.size:
      got, expected = (f"{h} x {w}" for h, w in (image.shape[:2], self.size))
      raise InputError(
        f"an image of {got} among images of {expected}; all images must have "
        "the same size"
      )
    height, width = self.input_size
    if self.size != self.input_size:
      shrinks = height * width < self.size[0] * self.size[1]
      method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
      image = cv2.resize(
        np.ascontiguousarray(image), (width, height), interpolation=method
      )
    padded = np.empty((*self.padded, 3), np.float32)
    padded[:] = 255 * np.float32(self.mean)
    top, left = _margin(height, self.patch), _margin(width, self.patch)
    padded[top : top + height, left : left + width] = image
    return padded

  def restore(
    self, maps: Float[Array, "*n gh gw"] | Float[np.ndarray, "*n gh gw"]
  ) -> Float[Array, "*n h w"] | Float[np.ndarray, "*n h w"]:
    """Resamples maps of the padded input to image pixels."""
    rows, columns = (
      _restoring_matrix(
        maps.shape[i - 2], self.input_size[i], side, self.patch, self.resize
      )
      for i, side in enumerate(self.size)
    )
    if isinstance(maps, np.ndarray):
      return rows @ maps @ columns.T
    precise = functools.partial(jnp.matmul, precision="highest")
    return precise(precise(jnp.asarray(rows), maps), jnp.asarray(columns.T))


def _margin(side: int, patch: int) -> int:
  """Padding before an axis; if odd, the extra pixel goes after it."""
  return -side % patch // 2


@functools.lru_cache(maxsize=64)
def _restoring_matrix(
  grid: int, input_side: int, side: int, patch: int, method: str
) -> np.ndarray:
  """One axis: upsamples to the padded input, crops, resizes to `side`."""
  if input_side % patch == 0:
    # In one step, since interpolating twice smooths twice.
    matrix = resizing.matrix(grid, side, method)
  else:
    padded, top = -(-input_side // patch) * patch, _margin(input_side, patch)
    matrix = resizing.matrix(grid, padded, method)[top : top + input_side]
    if input_side != side:
      matrix = resizing.matrix(input_side, side, method) @ matrix
  matrix = matrix.astype(np.float32)
  matrix.setflags(write=False)  # cached, so shared by all callers
  return matrix


def map_by_group(
  function: Callable[[list[Any]], Iterable[Any]],
  items: Iterable[Any],
  group: Callable[[Any], Hashable],
  *,
  batch_size: int,
) -> Iterator[Any]:
  """Applies a function to batches of one group; yields in the items' order.

  A batch runs when it is full, when eight batches' worth of later items have
  arrived, or at the end.
  """
  grouper = Grouper(batch_size, max_age=_MAX_WAIT * batch_size)
  results: dict[int, Any] = {}
  next_position = 0

  def run(batches: Iterable[list[tuple[int, Any]]]) -> None:
    for batch in batches:
      positions, members = zip(*batch, strict=True)
      results.update(zip(positions, function(list(members)), strict=True))

  for position, item in enumerate(items):
    run(grouper.add(position, group(item), item))
    while next_position in results:
      yield results.pop(next_position)
      next_position += 1
  run(grouper.flush())
  for position in sorted(results):
    yield results[position]


def encode_batches(
  encode: Encode, examples: Iterable[LabelledInput], *, batch_size: int
) -> Iterator[probe.FeatureBatch]:
  """Yields `features` and `targets`; the last batch may be smaller."""
  examples = iter(examples)
  while batch := list(itertools.islice(examples, batch_size)):
    inputs, targets = zip(*batch, strict=True)
    yield {"features": encode(list(inputs)), "targets": np.stack(targets)}


def training_batches(
  encode: Encode,
  read: Callable[[int, np.random.Generator], LabelledInput],
  count: int,
  *,
  batch_size: int,
  steps: int,
  seed: int,
) -> Iterator[probe.FeatureBatch]:
  """Batches of augmented examples for `probe.fit`.

  Threads read the next batch while the devices process this one; each process
  reads its share of the rows. `read` takes an index below `count` and a
  generator seeded by seed, step and row.
  """
  indices = probe.shuffled_batches(count, batch_size=batch_size, seed=seed)

  def read_row(example: int) -> LabelledInput:
    step, row = divmod(example, batch_size)
    rng = np.random.default_rng((seed, step, row))
    return read(int(indices(step)[row]), rng)

  rows = range(steps * batch_size)
  examples = shared_map(read_row, rows, ahead=batch_size)
  return encode_batches(encode, examples, batch_size=batch_size)


def cached_batches(
  batches: Iterable[probe.FeatureBatch], *, batch_size: int, seed: int
) -> Callable[[int], probe.FeatureBatch]:
  """Returns shuffled batches by step; keeps all rows of `batches` in memory."""
  parts = list(batches)
  rows = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  count = len(rows["targets"])
  indices = probe.shuffled_batches(count, batch_size=batch_size, seed=seed)
  return lambda step: {k: values[indices(step)] for k, values in rows.items()}
