"""Training a depth head on frozen features, and what it then predicts."""

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
from mtv_jax.evals.depth import (
  augment as depth_augment,
)
from mtv_jax.evals.depth import (
  heads as depth_heads,
)
from mtv_jax.evals.depth import (
  losses as depth_losses,
)
from mtv_jax.evals.depth import (
  views as depth_views,
)
from mtv_jax.evals.depth.augment import Example
from mtv_jax.evals.depth.heads import Head
from mtv_jax.evals.depth.protocols import Recipe
from mtv_jax.evals.depth.views import View
from mtv_jax.parallel.mesh import replicated_sharding

# Features and depth that are kept where nothing changes from step to step.
_CACHE_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Setup:
  """A recipe with everything that the data and the options decide.

  Attributes:
    recipe: what it is built on; the fields below go before its own.
    layers: blocks that are read.
    augment: of training images.
    steps: updates.
    lr: peak learning rate.
    batch_size: images a step.
    max_depth: of the last bin and of what is evaluated, in metres.
    dpt_features: channels of the DPT head.
    input_size: rows and columns of a whole image (or its central square) as
      the encoder sees it, before padding; None for its own size.
    warm_steps: see `Recipe`.
    tta: see `Recipe`.
    crop: of the evaluated pixels.
    seed: of the order of images, the augmentation and the head.
  """

  recipe: Recipe
  layers: tuple[int, ...]
  augment: str
  steps: int
  lr: float
  batch_size: int
  max_depth: float
  dpt_features: int
  input_size: tuple[int, int] | None
  warm_steps: int
  tta: str
  crop: str
  seed: int

  def head(self, encoder: Encoder) -> Head:
    """The head, for an encoder's features."""
    width = depth_views.channels(
      encoder, layers=self.layers, cls=self.recipe.cls
    )
    if self.recipe.head == "dpt":
      return depth_heads.DPTHead(width, self.max_depth, self.dpt_features)
    if self.recipe.head == "upsampled":
      return depth_heads.LinearHead(width, self.max_depth, upsample=4)
    return depth_heads.LinearHead(width, self.max_depth, norm="batch")

  def view(self, encoder: Encoder, size: tuple[int, int], whole: Any) -> View:
    """How images of `size`, cut from images of `whole`, are encoded."""
    wanted = self.input_size or whole
    scaled = tuple(
      round(s * w / full)
      for s, w, full in zip(size, wanted, whole, strict=True)
    )
    return View(size, scaled, encoder.spec.image.patch_size, self.recipe.resize)

  def example(self, data: DepthSet, i: int) -> Example:
    """An image and its depth, cut to the recipe's frame."""
    image, depth = data.images[i], data.depths[i]
    if image.shape[:2] != depth.shape:
      raise ValueError(
        f"{data.name}: image {i} has {image.shape[:2]} pixels and its depth "
        f"map {depth.shape}; expected the same"
      )
    if self.recipe.frame == "square":
      part = tuple(
        slice((side - min(depth.shape)) // 2, (side + min(depth.shape)) // 2)
        for side in depth.shape
      )
      image, depth = image[part], depth[part]
    return Example(image.astype(np.float32), depth)


def loss_of(setup: Setup, head: Head, view: View) -> Callable:
  """The loss that `probe.fit` minimises, of a batch of features and depth.

  The state carries the number of the step beside the head's own.
  """
  recipe = setup.recipe

  def loss(params, state, batch, rng):
    del rng
    predicted, inner = head.apply(
      params, state["head"], batch["features"], mode="train"
    )
    truth = batch["depth"]
    predicted = view.restore(predicted)
    valid = (truth > 0) & (truth <= setup.max_depth)
    warm = state["step"] >= setup.warm_steps
    total = recipe.sig_weight * depth_losses.sig_loss(
      predicted,
      truth,
      valid,
      ddof=recipe.ddof,
      variance_weight=warm.astype(jnp.float32),
    )
    if recipe.gradient_weight:
      total += recipe.gradient_weight * depth_losses.gradient_loss(
        predicted, truth, valid
      )
    return total, {"head": inner, "step": state["step"] + 1}

  return loss


def train(
  encoder: Encoder, data: DepthSet, setup: Setup, *, head: Head
) -> probe.Fitted:
  """Trains the head on a set; the same on every number of devices."""
  whole = setup.example(data, 0).depth.shape
  size = depth_augment.augmented_size(setup.augment, whole)
  view = setup.view(encoder, size, whole)
  params, state = head.init(jax.random.key(setup.seed))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return probe.fit(
      loss_of(setup, head, view),
      params,
      _Batches(encoder, data, setup, view, pool),
      optimizer=setup.recipe.optimizer(setup.steps, setup.lr),
      steps=setup.steps,
      state={"head": state, "step": jnp.int32(0)},
      seed=setup.seed,
      mesh=encoder.mesh,
    )


class _Batches:
  """Features and depth of the images of a step.

  Images of the next step are read and augmented while the encoder and the
  head work on this one. Without augmentation, features are computed once, if
  all of them fit.
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
    self._order = probe.shuffled(
      len(data.images), batch_size=setup.batch_size, seed=setup.seed
    )
    self._ready: dict[int, list[concurrent.futures.Future]] = {}
    self._kept = self._keep() if setup.augment == "none" else None

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    if self._kept is not None:
      rows = self._order(step)
      return {name: value[rows] for name, value in self._kept.items()}
    futures = self._ready.pop(step, None) or self._submit(step)
    if step + 1 < self._setup.steps:
      self._ready[step + 1] = self._submit(step + 1)
    return self._encoded([f.result() for f in futures])

  def _submit(self, step: int) -> list[concurrent.futures.Future]:
    return [
      self._pool.submit(self._example, int(i), (self._setup.seed, step, row))
      for row, i in enumerate(self._order(step))
    ]

  def _example(
    self, i: int, seed: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's input, and depth at the image's own size."""
    rng = np.random.default_rng(seed)
    example = self._setup.example(self._data, i)
    example = depth_augment.augment(example, self._setup.augment, rng)
    mean = self._encoder.preprocess.mean
    return self._view.place(example.image, mean), example.depth

  def _encoded(
    self, examples: Sequence[tuple[np.ndarray, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    images, depths = zip(*examples, strict=True)
    found = encode(self._encoder, list(images), setup=self._setup)
    return {"features": found, "depth": np.stack(depths)}

  def _keep(self) -> dict[str, np.ndarray] | None:
    grid, size = self._view.grid, self._view.size
    setup, count = self._setup, len(self._data.images)
    width = depth_views.channels(
      self._encoder, layers=setup.layers, cls=setup.recipe.cls
    )
    row = 4 * (grid[0] * grid[1] * width + size[0] * size[1])
    if count * row > _CACHE_BYTES:
      return None
    parts = []
    for start in range(0, count, 64):
      stop = min(count, start + 64)
      each = self._pool.map(
        lambda i: self._example(i, (setup.seed, i)), range(start, stop)
      )
      parts.append(self._encoded(list(each)))
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def encode(
  encoder: Encoder, images: list[np.ndarray], *, setup: Setup
) -> Float32[np.ndarray, "n h w c"]:
  """The recipe's features of inputs of one size."""
  return depth_views.features(
    encoder,
    images,
    layers=setup.layers,
    norm=setup.recipe.norm,
    cls=setup.recipe.cls,
    batch_size=setup.batch_size,
  )


@dataclasses.dataclass(frozen=True)
class Predicted:
  """One image of a set: what is there and what the head sees.

  Attributes:
    image: in 0..255, in the recipe's frame.
    truth: metres, 0 where unknown.
    depth: metres.
  """

  image: Float32[np.ndarray, "h w 3"]
  truth: Float32[np.ndarray, "h w"]
  depth: Float32[np.ndarray, "h w"]


def predictions(
  encoder: Encoder,
  data: DepthSet,
  setup: Setup,
  *,
  head: Head,
  fitted: probe.Fitted,
) -> Iterator[Predicted]:
  """Depth of every image of a set, in order, at the image's own size.

  Limited to what is evaluated, 1 mm to `max_depth`; with `tta="flip"` the mean
  of the prediction and that of the mirrored image, mirrored back.
  """
  size = setup.example(data, 0).depth.shape
  view = setup.view(encoder, size, size)
  predict = _predictor(head, encoder.mesh)
  params, state = fitted.params, fitted.state["head"]
  count, rows = len(data.images), setup.batch_size
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    read = functools.partial(setup.example, data)
    ready = list(pool.map(read, range(min(rows, count))))
    for start in range(0, count, rows):
      examples = ready
      stop = min(count, start + 2 * rows)
      futures = [pool.submit(read, i) for i in range(start + rows, stop)]
      maps = _maps(encoder, examples, setup, view, predict, params, state)
      for example, depth in zip(examples, maps, strict=True):
        limited = np.clip(depth, depth_heads.MIN_DEPTH, setup.max_depth)
        yield Predicted(example.image, example.depth, limited)
      ready = [f.result() for f in futures]


def _maps(encoder, examples, setup, view, predict, params, state):
  """Depth `[n, h, w]` of a batch, which is filled up to one shape."""
  mean = encoder.preprocess.mean
  images = [view.place(e.image, mean) for e in examples]
  if setup.tta == "flip":
    images += [view.place(e.image[:, ::-1], mean) for e in examples]
  found = encode(encoder, images, setup=setup)
  total = setup.batch_size * (2 if setup.tta == "flip" else 1)
  padding = [(0, total - len(found)), (0, 0), (0, 0), (0, 0)]
  batch = probe.place({"features": np.pad(found, padding)}, encoder.mesh)
  made = np.asarray(predict(params, state, batch["features"]))
  made = view.restore(made[: len(found)])
  if setup.tta == "flip":
    count = len(examples)
    made = (made[:count] + made[count:, :, ::-1]) / 2
  return made


@functools.lru_cache(maxsize=8)
def _predictor(head: Head, mesh: Any) -> Callable[..., jax.Array]:
  def predict(params: PyTree, state: PyTree, features: jax.Array):
    with jax.default_matmul_precision("highest"):
      return head.apply(params, state, features)[0]

  return jax.jit(predict, out_shardings=replicated_sharding(mesh))
