"""Training of a depth head on frozen features: setup, losses, predictions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import dense, probe, probe_heads
from mtv_jax.evals.core.examples import DepthSet
from mtv_jax.evals.core.padded_views import PaddedView
from mtv_jax.evals.core.probe_heads import ProbeHead
from mtv_jax.evals.depth import augment, heads
from mtv_jax.evals.depth.augment import DepthExample
from mtv_jax.evals.depth.depth_evaluator import Prediction
from mtv_jax.evals.depth.protocols import ProbeProtocol

# Limit of cached features and depth, without augmentation.
_CACHE_BYTES = 2 * 2**30
_EPS = 1e-3  # metres, added before the logarithm
_MEAN_WEIGHT = 0.15  # weight of the squared mean: 1 - 0.85
_STRIDES = (1, 2, 4, 6)


@dataclasses.dataclass(frozen=True)
class Setup:
  """A protocol resolved for an encoder and a data set."""

  encoder: Encoder
  protocol: ProbeProtocol
  layers: tuple[int, ...]  # blocks to read
  max_depth: float  # limit of bins and evaluated pixels, in metres
  dpt_features: int
  # Rows and columns that a whole image (or its central square) is resized to,
  # before padding; None for no resizing.
  input_size: tuple[int, int] | None
  seed: int
  schedule: probe.ProbeSchedule  # steps and batch size, and the reason

  @property
  def has_cls(self) -> bool:
    """Whether the CLS token is concatenated to every patch.

    Probe3D does so for DINO and DINOv2, but not for CLIP, MAE and more. We
    detect DINOv2 and its successors by CLS pooling plus layer scale, which only
    they have here.
    """
    image = self.encoder.spec.image
    if self.protocol.cls == "dino_concat":
      return image.pool == "cls" and image.layer_scale is not None
    return self.protocol.cls == "concat" and image.cls_token

  @property
  def channels(self) -> int:
    """Channels of the head's input."""
    tokens = len(self.layers) * (1 + self.has_cls)
    return tokens * self.encoder.spec.image.width

  @property
  def head(self) -> ProbeHead | heads.DPTHead:
    """The head, which predicts bin logits."""
    if self.protocol.head == "dpt":
      return heads.DPTHead(self.dpt_features)
    if self.protocol.head == "upsampled":
      # Upstream upsamples the features: equal, but more expensive.
      return ProbeHead(heads.BINS, batch_norm=False, upsample=4)
    return ProbeHead(heads.BINS)

  def features(
    self, images: list[np.ndarray]
  ) -> Float32[np.ndarray, "n h w c"]:
    """The head's input, from padded images of one size in 0..255."""
    return dense.features(
      self.encoder,
      images,
      self.layers,
      norm=self.protocol.norm,
      cls=self.has_cls,
      batch_size=self.protocol.batch_size,
    )

  def view(self, size: tuple[int, int], whole: tuple[int, int]) -> PaddedView:
    """Padded view of crops of `size` from images of size `whole`."""
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

  def example(self, data: DepthSet, i: int) -> DepthExample:
    """An image and its depth, cropped to the protocol's frame."""
    image, depth = data.read_pair(i)
    if self.protocol.frame == "square":
      side = min(depth.shape)
      part = tuple(slice((s - side) // 2, (s + side) // 2) for s in depth.shape)
      image, depth = image[part], depth[part]
    return DepthExample(image.astype(np.float32), depth)


def train(setup: Setup, data: DepthSet) -> probe.FitResult:
  """Trains the head; the result doesn't depend on the number of devices.

  Without augmentation, features are cached if they fit in memory.
  """
  protocol, head, count = setup.protocol, setup.head, len(data.images)
  full_shape = setup.example(data, 0).depth.shape
  size = augment.augmented_size(protocol.augment, full_shape)
  view = setup.view(size, full_shape)
  to_depth = heads.DepthBins(setup.max_depth)

  def read(i, rng=None):
    example = augment.AUGMENTS[protocol.augment](setup.example(data, i), rng)
    return view.pad(example.image), example.depth

  def loss_fn(params, state, batch, rng):
    del rng
    step, truth = state["step"], batch["targets"]  # truth: [B, H, W], metres
    logits, head_state = head.apply(
      {"params": params, **state["head"]},
      batch["features"],
      train=True,
      mutable=["batch_stats"],
    )
    valid = (truth > 0) & (truth <= setup.max_depth)
    maps = view.restore(to_depth(logits)), truth, valid
    variance_weight = (step >= protocol.warm_steps).astype(jnp.float32)
    loss = protocol.sig_weight * sig_loss(
      *maps, ddof=protocol.ddof, variance_weight=variance_weight
    )
    if protocol.gradient_weight:
      loss += protocol.gradient_weight * gradient_loss(*maps)
    return loss, {"head": head_state, "step": step + 1}

  options = {"batch_size": protocol.batch_size, "seed": setup.seed}
  values = math.prod(view.grid) * setup.channels + math.prod(size)
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
  params, state = heads.init_depth_head(head, setup.channels, seed=setup.seed)
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
  """Yields each image's predicted depth in metres, at image size.

  Clipped to 1 mm .. `max_depth`; `tta="flip"` averages with the flipped
  prediction of the flipped image.
  """
  size = setup.example(data, 0).depth.shape
  view, flip = setup.view(size, size), setup.protocol.tta == "flip"
  rows = setup.protocol.batch_size
  predict_depth = probe_heads.predict_fn(
    setup.head,
    [(fitted.params, fitted.state["head"])],
    mesh=setup.encoder.mesh,
    batch_size=rows * (2 if flip else 1),
    finish=heads.DepthBins(setup.max_depth),
  )
  read = functools.partial(setup.example, data)
  examples = dense.shared_map(read, range(len(data.images)))
  while batch := list(itertools.islice(examples, rows)):
    images = [example.image for example in batch]
    if flip:
      images += [image[:, ::-1] for image in images]
    features = setup.features([view.pad(image) for image in images])
    (maps,) = predict_depth(features)
    maps = view.restore(maps)
    if flip:
      maps = (maps[: len(batch)] + maps[len(batch) :, :, ::-1]) / 2
    for example, depth in zip(batch, maps, strict=True):
      clipped = np.clip(depth, heads.MIN_DEPTH, setup.max_depth)
      yield example.image, example.depth, clipped


def _log_error(predicted, truth, valid):
  """ln(d + 0.001) - ln(g + 0.001); 0 for invalid pixels."""
  # Masked before and after the log, whose gradient may be non-finite.
  predicted, truth = (jnp.where(valid, x, 1.0) for x in (predicted, truth))
  error = jnp.log(predicted + _EPS) - jnp.log(truth + _EPS)
  return jnp.where(valid, error, 0.0)


def sig_loss(
  predicted: Float[Array, "b h w"],
  truth: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
  *,
  ddof: int = 1,
  variance_weight: Float[Array, ""] | float = 1.0,
) -> Float[Array, ""]:
  """Scale-invariant log error: sqrt(var g + 0.15 (mean g)^2).

  Eigen et al. 2014, with the root and the constants of AdaBins. The variance is
  unbiased in DINOv2's probes and biased in Probe3D's, which writes
  mean g^2 - 0.85 (mean g)^2.

  Depths are in metres; the loss is 0 without valid pixels. `ddof` is 1 for the
  unbiased variance; `variance_weight` is 0 during warmup.
  """
  g = _log_error(predicted, truth, valid)
  count = valid.sum().astype(jnp.float32)
  mean = g.sum() / jnp.maximum(count, 1)
  squares = jnp.where(valid, jnp.square(g - mean), 0.0).sum()
  variance = squares / jnp.maximum(count - ddof, 1)
  inside = variance_weight * variance + _MEAN_WEIGHT * jnp.square(mean)
  # The root isn't differentiable at 0, the value of a perfect prediction.
  return jnp.where(count > 0, jnp.sqrt(jnp.maximum(inside, 1e-12)), 0.0)


def gradient_loss(
  predicted: Float[Array, "b h w"],
  truth: Float[Array, "b h w"],
  valid: Bool[Array, "b h w"],
) -> Float[Array, ""]:
  """Multi-scale gradient loss of the log error.

      sum_k (1 / N_k) sum |g(y + 2, x) - g(y, x)| + |g(y, x + 2) - g(y, x)|

  over every 1st, 2nd, 4th and 6th pixel, with N_k valid pixels. A difference
  counts if both pixels are valid (Monocular-Depth-Estimation-Toolbox).
  """
  error = _log_error(predicted, truth, valid)
  total = jnp.float32(0)
  for stride in _STRIDES:
    g, m = (x[:, ::stride, ::stride] for x in (error, valid))
    down = jnp.abs(g[:, 2:] - g[:, :-2]) * (m[:, 2:] & m[:, :-2])
    across = jnp.abs(g[:, :, 2:] - g[:, :, :-2]) * (m[:, :, 2:] & m[:, :, :-2])
    total += (down.sum() + across.sum()) / jnp.maximum(m.sum(), 1)
  return total
