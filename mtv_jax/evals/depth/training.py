"""Training of a depth head on frozen features, and its predictions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, PyTree

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import dense, probe
from mtv_jax.evals.core.examples import DepthSet
from mtv_jax.evals.core.padded_views import PaddedView
from mtv_jax.evals.depth import augment, heads, losses
from mtv_jax.evals.depth.augment import Example
from mtv_jax.evals.depth.base import Prediction
from mtv_jax.evals.depth.protocols import Protocol
from mtv_jax.parallel.mesh import replicated_sharding

# Features and depth that are cached if nothing changes between steps.
_CACHE_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Setup:
  """A protocol resolved for an encoder and a data set."""

  encoder: Encoder
  protocol: Protocol
  layers: tuple[int, ...]  # blocks that are read
  max_depth: float  # limit of the bins and of the evaluated pixels, in metres
  dpt_features: int
  # Rows and columns of a whole image (or its central square) as the encoder
  # sees it, before padding; None for its own size.
  input_size: tuple[int, int] | None
  seed: int
  schedule: probe.Schedule  # steps and batch size of the protocol, and why

  @property
  def has_cls(self) -> bool:
    """Whether the CLS token is beside every patch.

    Probe3D reads it of DINO and DINOv2, and patches alone of CLIP, MAE and
    others. The DINO family is told by what only DINOv2 and its successors have
    here: the CLS token as the image's feature, and layer scale.
    """
    image = self.encoder.spec.image
    if self.protocol.cls == "dino_concat":
      return image.pool == "cls" and image.layer_scale is not None
    return self.protocol.cls == "concat" and image.cls_token

  def head(self) -> heads.Head:
    """The head for the encoder's features."""
    tokens = len(self.layers) * (1 + self.has_cls)
    width = tokens * self.encoder.spec.image.width
    if self.protocol.head == "dpt":
      return heads.DPTHead(width, self.max_depth, self.dpt_features)
    if self.protocol.head == "upsampled":
      return heads.LinearHead(width, self.max_depth, upsample=4)
    return heads.LinearHead(width, self.max_depth, batch_norm=True)

  def features(
    self, images: list[np.ndarray]
  ) -> Float32[np.ndarray, "n h w c"]:
    """The head's input, of padded images of one size in 0..255."""
    return dense.features(
      self.encoder,
      images,
      self.layers,
      norm=self.protocol.norm,
      cls=self.has_cls,
      batch_size=self.protocol.batch_size,
    )

  def view(self, size: tuple[int, int], whole: tuple[int, int]) -> PaddedView:
    """The encoder's view of crops of `size` from images of size `whole`."""
    input_size = tuple(
      round(s * w / full)
      for s, w, full in zip(size, self.input_size or whole, whole, strict=True)
    )
    return PaddedView(
      size,
      input_size,
      patch=self.encoder.spec.image.patch_size,
      resize=self.protocol.resize,
      mean=self.encoder.preprocess.mean,
    )

  def example(self, data: DepthSet, i: int) -> Example:
    """An image and its depth, cropped as the protocol does."""
    image, depth = dense.read_pair(data.name, data.images, data.depths, i)
    if self.protocol.frame == "square":
      side = min(depth.shape)
      part = tuple(slice((s - side) // 2, (s + side) // 2) for s in depth.shape)
      image, depth = image[part], depth[part]
    return Example(image.astype(np.float32), depth)


def train(setup: Setup, data: DepthSet) -> probe.FitResult:
  """Trains the head; the result doesn't depend on the number of devices.

  Without augmentation, features are computed once if they fit in memory.
  """
  protocol, head, count = setup.protocol, setup.head(), len(data.images)
  full_shape = setup.example(data, 0).depth.shape
  size = augment.augmented_size(protocol.augment, full_shape)
  view = setup.view(size, full_shape)

  def read(i, rng=None):
    example = augment.AUGMENTS[protocol.augment](setup.example(data, i), rng)
    return view.pad(example.image), example.depth

  def loss_fn(params, state, batch, rng):
    del rng
    step, truth = state["step"], batch["targets"]  # truth: [B, H, W], metres
    predicted, head_state = head.apply(
      params, state["head"], batch["features"], train=True
    )
    valid = (truth > 0) & (truth <= setup.max_depth)
    maps = view.restore(predicted), truth, valid
    variance_weight = (step >= protocol.warm_steps).astype(jnp.float32)
    loss = protocol.sig_weight * losses.sig_loss(
      *maps, ddof=protocol.ddof, variance_weight=variance_weight
    )
    if protocol.gradient_weight:
      loss += protocol.gradient_weight * losses.gradient_loss(*maps)
    return loss, {"head": head_state, "step": step + 1}

  options = {"batch_size": protocol.batch_size, "seed": setup.seed}
  values = math.prod(view.grid) * head.channels + math.prod(size)
  if protocol.augment == "none" and 4 * count * values <= _CACHE_BYTES:
    examples = dense.shared_map(read, range(count))
    encoded = dense.encode_batches(
      setup.features, examples, batch_size=4 * protocol.batch_size
    )
    batches = dense.cached_batches(encoded, **options)
  else:
    batches = dense.training_batches(
      setup.features, read, count, steps=protocol.steps, **options
    )
  params, state = head.init(jax.random.key(setup.seed))
  return probe.fit(
    loss_fn,
    params,
    batches,
    optimizer=protocol.optimizer(),
    steps=protocol.steps,
    state={"head": state, "step": jnp.int32(0)},
    seed=setup.seed,
    mesh=setup.encoder.mesh,
  )


def predict(
  setup: Setup, data: DepthSet, fitted: probe.FitResult
) -> Iterator[Prediction]:
  """Depth of every image in order, in metres, at the size of the image.

  Clipped to the evaluated range, 1 mm to `max_depth`; with `tta="flip"` the
  mean of the prediction and the flipped prediction of the flipped image.
  """
  size = setup.example(data, 0).depth.shape
  view = setup.view(size, size)
  read = functools.partial(setup.example, data)
  examples = dense.shared_map(read, range(len(data.images)))
  rows = setup.protocol.batch_size
  while batch := list(itertools.islice(examples, rows)):
    images = [example.image for example in batch]
    maps = _predict_maps(setup, view, fitted, images)
    for example, depth in zip(batch, maps, strict=True):
      clipped = np.clip(depth, heads.MIN_DEPTH, setup.max_depth)
      yield example.image, example.depth, clipped


def _predict_maps(
  setup: Setup,
  view: PaddedView,
  fitted: probe.FitResult,
  images: list[np.ndarray],
) -> Float32[np.ndarray, "n h w"]:
  """Depth of a batch, padded to one shape for the compiler."""
  flip, mesh = setup.protocol.tta == "flip", setup.encoder.mesh
  count = len(images)
  if flip:
    images = images + [image[:, ::-1] for image in images]
  features = setup.features([view.pad(image) for image in images])
  total = setup.protocol.batch_size * (2 if flip else 1)
  padding = [(0, total - len(features)), (0, 0), (0, 0), (0, 0)]
  batch = probe.shard_batch({"features": np.pad(features, padding)}, mesh)
  depth = _predict_fn(setup.head(), mesh)(
    fitted.params, fitted.state["head"], batch["features"]
  )
  depth = view.restore(np.asarray(depth)[: len(features)])
  return (depth[:count] + depth[count:, :, ::-1]) / 2 if flip else depth


@functools.lru_cache(maxsize=8)
def _predict_fn(head: heads.Head, mesh: Any) -> Callable[..., jax.Array]:
  def predict_fn(params: PyTree, state: PyTree, features: jax.Array):
    with jax.default_matmul_precision("highest"):
      return head.apply(params, state, features)[0]

  return jax.jit(predict_fn, out_shardings=replicated_sharding(mesh))
