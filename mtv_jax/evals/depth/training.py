"""Training of a depth head on frozen features, and its predictions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, PyTree

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import probe
from mtv_jax.evals.core.examples import DepthSet
from mtv_jax.evals.depth import augment, heads, losses, views
from mtv_jax.evals.depth.augment import Example
from mtv_jax.evals.depth.base import read_pair
from mtv_jax.evals.depth.protocols import Protocol
from mtv_jax.evals.depth.views import View
from mtv_jax.parallel.mesh import replicated_sharding

# Features and depth that are cached if nothing changes between steps.
_CACHE_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Setup:
  """A protocol resolved for an encoder and a data set.

  Attributes:
    protocol: with the values of the options.
    layers: blocks that are read.
    max_depth: of the last bin and of the evaluated pixels, in metres.
    dpt_features: channels of the DPT head.
    input_size: rows and columns of a whole image (or its central square) as
      the encoder sees it, before padding; None for its own size.
    seed: of the order of images, the augmentation and the head.
  """

  protocol: Protocol
  layers: tuple[int, ...]
  max_depth: float
  dpt_features: int
  input_size: tuple[int, int] | None
  seed: int

  def head(self, encoder: Encoder) -> heads.Head:
    """The head for an encoder's features."""
    width = views.channels(encoder, self.protocol, self.layers)
    if self.protocol.head == "dpt":
      return heads.DPTHead(width, self.max_depth, self.dpt_features)
    if self.protocol.head == "upsampled":
      return heads.LinearHead(width, self.max_depth, upsample=4)
    return heads.LinearHead(width, self.max_depth, norm="batch")

  def view(self, encoder: Encoder, size: tuple[int, int], whole: Any) -> View:
    """The encoder's view of crops of `size` from images of size `whole`."""
    input_size = tuple(
      round(s * w / full)
      for s, w, full in zip(size, self.input_size or whole, whole, strict=True)
    )
    patch = encoder.spec.image.patch_size
    return View(size, input_size, patch, self.protocol.resize)

  def example(self, data: DepthSet, i: int) -> Example:
    """An image and its depth, cropped to the protocol's frame."""
    image, depth = read_pair(data, i)
    if self.protocol.frame == "square":
      side = min(depth.shape)
      part = tuple(slice((s - side) // 2, (s + side) // 2) for s in depth.shape)
      image, depth = image[part], depth[part]
    return Example(image.astype(np.float32), depth)


def train(
  encoder: Encoder, data: DepthSet, setup: Setup, *, head: heads.Head
) -> probe.FitResult:
  """Trains the head; the result doesn't depend on the number of devices."""
  whole = setup.example(data, 0).depth.shape
  size = augment.augmented_size(setup.protocol.augment, whole)
  view = setup.view(encoder, size, whole)

  def loss_fn(params, state, batch, rng):
    del rng
    predicted, inner = head.apply(
      params, state["head"], batch["features"], mode="train"
    )
    loss = losses.probe_loss(
      view.restore(predicted),  # [B, H, W], metres
      batch["depth"],
      protocol=setup.protocol,
      max_depth=setup.max_depth,
      step=state["step"],
    )
    return loss, {"head": inner, "step": state["step"] + 1}

  params, state = head.init(jax.random.key(setup.seed))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return probe.fit(
      loss_fn,
      params,
      _Batches(encoder, data, setup, view, pool),
      optimizer=setup.protocol.optimizer(),
      steps=setup.protocol.steps,
      state={"head": state, "step": jnp.int32(0)},
      seed=setup.seed,
      mesh=encoder.mesh,
    )


class _Batches:
  """Features and depth of the images of a step.

  The images of the next step are read and augmented while the encoder and the
  head process this one. Without augmentation, features are computed once if
  all of them fit in memory.
  """

  def __init__(
    self,
    encoder: Encoder,
    data: DepthSet,
    setup: Setup,
    view: View,
    pool: concurrent.futures.Executor,
  ):
    self._encoder, self._data, self._setup = encoder, data, setup
    self._view, self._pool = view, pool
    self._order = probe.shuffled_batches(
      len(data.images), batch_size=setup.protocol.batch_size, seed=setup.seed
    )
    self._pending: dict[int, list[concurrent.futures.Future]] = {}
    self._cache = self._encode_all()

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    if self._cache is not None:
      rows = self._order(step)
      return {name: value[rows] for name, value in self._cache.items()}
    futures = self._pending.pop(step, None) or self._submit(step)
    if step + 1 < self._setup.protocol.steps:
      self._pending[step + 1] = self._submit(step + 1)
    return self._encode([f.result() for f in futures])

  def _submit(self, step: int) -> list[concurrent.futures.Future]:
    return [
      self._pool.submit(self._read, int(i), (self._setup.seed, step, row))
      for row, i in enumerate(self._order(step))
    ]

  def _read(
    self, i: int, seed: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's input, and depth at the size of the (augmented) image."""
    rng = np.random.default_rng(seed)
    example = self._setup.example(self._data, i)
    example = augment.augment(example, self._setup.protocol.augment, rng)
    mean = self._encoder.preprocess.mean
    return self._view.pad(example.image, mean), example.depth

  def _encode(
    self, examples: Sequence[tuple[np.ndarray, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    images, depths = zip(*examples, strict=True)
    features = views.features(
      self._encoder, list(images), self._setup.protocol, self._setup.layers
    )
    return {"features": features, "depth": np.stack(depths)}

  def _encode_all(self) -> dict[str, np.ndarray] | None:
    """All features and depths; None with augmentation, or if too large."""
    (rows, columns), size = self._view.grid, self._view.size
    setup, count = self._setup, len(self._data.images)
    width = views.channels(self._encoder, setup.protocol, setup.layers)
    example_bytes = 4 * (rows * columns * width + size[0] * size[1])
    if setup.protocol.augment != "none" or (
      count * example_bytes > _CACHE_BYTES
    ):
      return None
    parts = []
    for start in range(0, count, 64):
      block = range(start, min(count, start + 64))
      read = self._pool.map(lambda i: self._read(i, (setup.seed, i)), block)
      parts.append(self._encode(list(read)))
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Predicted depth of one image.

  Attributes:
    image: in 0..255, in the protocol's frame.
    truth: metres, 0 where unknown.
    depth: metres.
  """

  image: Float32[np.ndarray, "h w 3"]
  truth: Float32[np.ndarray, "h w"]
  depth: Float32[np.ndarray, "h w"]


def predict(
  encoder: Encoder,
  data: DepthSet,
  setup: Setup,
  *,
  head: heads.Head,
  fitted: probe.FitResult,
) -> Iterator[Prediction]:
  """Depth of every image in order, at the size of the image.

  Clipped to the evaluated range, 1 mm to `max_depth`; with `tta="flip"` the
  mean of the prediction and the flipped prediction of the flipped image.
  """
  size = setup.example(data, 0).depth.shape
  view = setup.view(encoder, size, size)
  count, rows = len(data.images), setup.protocol.batch_size
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    read = functools.partial(setup.example, data)
    ready = list(pool.map(read, range(min(rows, count))))
    for start in range(0, count, rows):
      examples = ready
      block = range(start + rows, min(count, start + 2 * rows))
      futures = [pool.submit(read, i) for i in block]
      maps = _predict_batch(encoder, examples, setup, view, head, fitted)
      for example, depth in zip(examples, maps, strict=True):
        clipped = np.clip(depth, heads.MIN_DEPTH, setup.max_depth)
        yield Prediction(example.image, example.depth, clipped)
      ready = [f.result() for f in futures]


def _predict_batch(encoder, examples, setup, view, head, fitted):
  """Depth `[n, h, w]` of a batch, padded to one shape for the compiler."""
  flip = setup.protocol.tta == "flip"
  mean = encoder.preprocess.mean
  images = [view.pad(e.image, mean) for e in examples]
  if flip:
    images += [view.pad(e.image[:, ::-1], mean) for e in examples]
  features = views.features(encoder, images, setup.protocol, setup.layers)
  total = setup.protocol.batch_size * (2 if flip else 1)
  padding = [(0, total - len(features)), (0, 0), (0, 0), (0, 0)]
  batch = probe.shard_batch(
    {"features": np.pad(features, padding)}, encoder.mesh
  )
  depth = _predict_fn(head, encoder.mesh)(
    fitted.params, fitted.state["head"], batch["features"]
  )
  depth = view.restore(np.asarray(depth)[: len(features)])
  if flip:
    count = len(examples)
    depth = (depth[:count] + depth[count:, :, ::-1]) / 2
  return depth


@functools.lru_cache(maxsize=8)
def _predict_fn(head: heads.Head, mesh: Any) -> Callable[..., jax.Array]:
  def predict_fn(params: PyTree, state: PyTree, features: jax.Array):
    with jax.default_matmul_precision("highest"):
      return head.apply(params, state, features)[0]

  return jax.jit(predict_fn, out_shardings=replicated_sharding(mesh))
