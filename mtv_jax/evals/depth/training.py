"""Published depth probes: protocols, schedules, losses, training, predictions.

linear  DINOv3's: last block after the final norm, batch norm, linear layer
lin1    DINOv2's: last block, CLS token concatenated to every patch
lin4    DINOv2's: as lin1, over four blocks
dpt     Probe3D's (El Banani et al. 2024): DPT over four blocks
probe3d Probe3D's surface-normal probe, see `depth_probe.py`
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import dense, probe, probe_heads
from mtv_jax.evals.core.dense import PaddedView
from mtv_jax.evals.core.examples import DenseSet
from mtv_jax.evals.depth import augment
from mtv_jax.evals.depth.augment import DepthExample
from mtv_jax.evals.depth.metrics import Prediction
from mtv_jax.models.heads import dpt
from mtv_jax.parallel.distributed import shared_map

BINS = 256
MIN_DEPTH = 1e-3  # metres, the first bin
Maps = Float[Array, "b h w"]
Scalar = Float[Array, ""]

# Limit of cached features and depth, without augmentation.
_CACHE_BYTES = 2 * 2**30
_EPS = 1e-3  # metres, added before the logarithm
# Added to every weight, so that the gradient survives if all weights are 0.
_FLOOR = 0.1
_MEAN_WEIGHT = 0.15  # weight of the squared mean: 1 - 0.85
_STRIDES = (1, 2, 4, 6)


@dataclasses.dataclass(frozen=True)
class ProbeProtocol:
  """A published NYUv2 probe; the defaults are DINOv3's linear probe."""

  # The `last` block, or each quarter's last: `quarters` as in DINOv2 for 24
  # blocks, `even_quarters` as in Probe3D.
  layers: str = "last"
  norm: str = "final"  # `final` applies the final norm to the features
  # `concat` appends the CLS token, if any, to every patch; `dino_concat` only
  # for the DINO family.
  cls: str = "off"
  head: str = "linear"  # `upsampled` (x4, without batch norm) or `dpt`
  resize: str = "bilinear"  # resizing of predictions, see `resizing`
  frame: str = "full"  # or `square`: the image's central square
  augment: str = "toolbox"  # see `augment.AUGMENTS`
  schedule: str = "warm_cosine"  # see `SCHEDULES`
  lr: float = 3e-4
  b1: float = 0.9  # constant; upstream cycles it with the learning rate
  b2: float = 0.99
  weight_decay: float = 1e-4
  clip: float | None = 35.0  # maximum global norm of the gradient
  batch_size: int = 16
  steps: int | None = 38_400  # updates; if None, `epochs` over the images
  epochs: int | None = None
  sig_weight: float = 1.0
  gradient_weight: float = 0.0
  ddof: int = 1  # for the variance in `sig_loss`
  warm_steps: int = 100  # first updates, without the variance in `sig_loss`
  tta: str = "flip"  # averages the predictions of image and mirror image
  crop: str = "nyu_eigen"  # evaluated pixels, see `metrics.crop_mask`

  def out_indices(self, depth: int) -> tuple[int, ...]:
    """Indices of the blocks to read, for an encoder with `depth` blocks."""
    if self.layers == "last":
      return (depth - 1,)
    if self.layers == "quarters":
      return dpt.quarter_layers(depth)
    return tuple(math.ceil(depth * i / 4) - 1 for i in (1, 2, 3, 4))

  def optimizer(self) -> optax.GradientTransformation:
    """AdamW with the schedule over `steps`."""
    schedule = SCHEDULES[self.schedule]
    rate = functools.partial(schedule, steps=self.steps, lr=self.lr)
    adamw = optax.adamw(rate, self.b1, self.b2, weight_decay=self.weight_decay)
    if self.clip is None:
      return adamw
    return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


_LIN1 = ProbeProtocol(
  norm="none",
  cls="concat",
  head="upsampled",
  schedule="one_cycle",
  lr=1e-4,
  b1=0.95,
  weight_decay=0.01,
  sig_weight=10.0,
  gradient_weight=0.5,
)
_DPT = ProbeProtocol(
  layers="even_quarters",
  norm="none",
  cls="dino_concat",
  head="dpt",
  resize="bilinear_corners",
  frame="square",
  augment="probe3d",
  schedule="quarter_cosine",
  lr=5e-4,
  b2=0.999,
  weight_decay=0.01,
  clip=None,
  batch_size=8,
  steps=None,
  epochs=10,
  sig_weight=10.0,
  gradient_weight=0.5,
  ddof=0,
  warm_steps=0,
  tta="none",
  crop="none",
)
PROTOCOLS = {
  "linear": ProbeProtocol(),
  "lin1": _LIN1,
  "lin4": dataclasses.replace(_LIN1, layers="quarters"),
  "dpt": _DPT,
  "probe3d": dataclasses.replace(_DPT, resize="bicubic_corners"),
}


def warm_cosine(step: int | jax.Array, *, steps: int, lr: float) -> Scalar:
  """DINOv3's schedule: cosine with linear warmup over the first third.

  With T steps and W = T / 3: lr / 1000 + lr (1 + cos(pi s / T)) / 2 * s / W
  before W, then a cosine from lr to lr / 25000 at (s + 1) / T.
  """
  warmup = max(1, steps // 3)  # 12,800 of 38,400
  s = jnp.asarray(step, jnp.float32)
  ramp = lr / 1000 + _cosine(lr, 0.0, s / steps) * s / warmup
  return jnp.where(s < warmup, ramp, _cosine(lr, lr / 25_000, (s + 1) / steps))


def one_cycle(step: int | jax.Array, *, steps: int, lr: float) -> Scalar:
  """PyTorch's OneCycleLR (Smith and Topin 2018): two half cosines.

  From lr / 25 up to lr at 0.3 of the steps, down to lr / 2500 at the last step.
  """
  s = jnp.asarray(step, jnp.float32)
  peak = max(0.3 * steps - 1, 1e-6)
  up = _cosine(lr / 25, lr, s / peak)
  down = _cosine(lr, lr / 25 / 100, (s - peak) / max(steps - 1 - peak, 1e-6))
  return jnp.where(s <= peak, up, down)


def quarter_cosine(step: int | jax.Array, *, steps: int, lr: float) -> Scalar:
  """Probe3D's schedule: lr (0.01 + 0.99 f), f linear to 1, then cos(pi r / 2).

  r = (s - W) / (T - W), with T steps and W = 0.15 T warmup steps (1.5 of 10
  epochs).
  """
  warmup = max(1, round(0.15 * steps))
  s = jnp.asarray(step, jnp.float32)
  progress = (s - warmup) / max(steps - warmup, 1)
  factor = jnp.where(s <= warmup, s / warmup, jnp.cos(jnp.pi / 2 * progress))
  return lr * (0.01 + 0.99 * factor)


def _cosine(start: float, end: float, progress: jax.Array) -> jax.Array:
  return end + (start - end) * (1 + jnp.cos(jnp.pi * progress)) / 2


SCHEDULES = {
  "warm_cosine": warm_cosine,
  "one_cycle": one_cycle,
  "quarter_cosine": quarter_cosine,
}


@dataclasses.dataclass(frozen=True)
class DepthTarget:
  """Metric depth, trained with SIG and gradient losses.

  Depth is the mean of evenly spaced bins, weighted by the head's logits: Bhat
  et al. 2021 (AdaBins) as in DINOv2's probes.
  """

  outputs = BINS  # channels of the head
  max_depth: float  # last bin and limit for training pixels, in metres

  def decode(self, logits: Float[Array, "b h w k"]) -> Maps:
    """sum_k p_k b_k with p = (relu(z) + 0.1) / sum (relu(z) + 0.1)."""
    bins = np.linspace(MIN_DEPTH, self.max_depth, BINS, dtype=np.float32)
    weights = jax.nn.relu(logits) + _FLOOR
    return weights @ bins / weights.sum(-1)

  def loss(
    self, maps: Maps, truth: Maps, protocol: ProbeProtocol, step
  ) -> Scalar:
    """Loss of maps at image size."""
    valid = (truth > 0) & (truth <= self.max_depth)
    variance_weight = (step >= protocol.warm_steps).astype(jnp.float32)
    loss = protocol.sig_weight * sig_loss(
      *(maps, truth, valid),
      ddof=protocol.ddof,
      variance_weight=variance_weight,
    )
    if protocol.gradient_weight:
      loss += protocol.gradient_weight * gradient_loss(maps, truth, valid)
    return loss

  def finish(self, maps: np.ndarray) -> np.ndarray:
    """Clips maps at image size to valid depth."""
    return np.clip(maps, MIN_DEPTH, self.max_depth)


@dataclasses.dataclass(frozen=True)
class Setup:
  """A protocol resolved for an encoder and a data set."""

  encoder: Encoder
  protocol: ProbeProtocol
  layers: tuple[int, ...]  # blocks to read
  target: Any  # `DepthTarget` or `NormalsTarget`
  dpt_features: int
  # Rows and columns that a whole image (or its central square) is resized to,
  # before padding; None for no resizing.
  input_size: tuple[int, int] | None
  seed: int
  schedule: probe.ProbeSchedule  # steps, batch size and their reason

  @property
  def has_cls(self) -> bool:
    """Whether the CLS token is concatenated to every patch.

    Probe3D does so for DINO and DINOv2, but not for CLIP, MAE and more. Only
    DINOv2 and its successors have both CLS pooling and layer scale here.
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
  def head(self) -> probe_heads.ProbeHead | probe_heads.DPTHead:
    """The head, which predicts logits of bins or normals."""
    outputs = self.target.outputs
    if self.protocol.head == "dpt":
      return probe_heads.DPTHead(self.dpt_features, outputs)
    if self.protocol.head == "upsampled":
      # Upstream upsamples the features: equal, but more expensive.
      return probe_heads.ProbeHead(outputs, batch_norm=False, upsample=4)
    return probe_heads.ProbeHead(outputs)

  def features(self, images: list[np.ndarray]) -> np.ndarray:
    """The head's input `[n, h, w, c]`, from padded images in 0..255."""
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

  def example(self, data: DenseSet, i: int) -> DepthExample:
    """An image and its map, cropped to the protocol's frame."""
    image, depth = data.read_pair(i)
    if self.protocol.frame == "square":
      size = image.shape[:2]
      side = min(size)
      square = tuple(slice((s - side) // 2, (s + side) // 2) for s in size)
      image, depth = image[square], depth[square]
    return DepthExample(image.astype(np.float32), depth)


def train(setup: Setup, data: DenseSet) -> probe.FitResult:
  """Trains the head; the result doesn't depend on the number of devices.

  Without augmentation, features are cached if they are small enough.
  """
  protocol, head, count = setup.protocol, setup.head, len(data.images)
  full_shape = setup.example(data, 0).size
  size = augment.augmented_size(protocol.augment, full_shape)
  view = setup.view(size, full_shape)

  def read(i, rng=None):
    example = augment.AUGMENTS[protocol.augment](setup.example(data, i), rng)
    return view.pad(example.image), example.depth

  def loss_fn(params, state, batch, rng):
    step = state["step"]
    logits, head_state = probe_heads.apply_training(
      head, params, state["head"], batch["features"], rng
    )
    maps = view.restore(setup.target.decode(logits))
    loss = setup.target.loss(maps, batch["targets"], protocol, step)
    return loss, {"head": head_state, "step": step + 1}

  options = {"batch_size": protocol.batch_size, "seed": setup.seed}
  num_values = math.prod(view.grid) * setup.channels + math.prod(size)
  if protocol.augment == "none" and 4 * count * num_values <= _CACHE_BYTES:
    examples = shared_map(read, range(count))
    encoded_batches = dense.encode_batches(
      setup.features, examples, batch_size=4 * protocol.batch_size
    )
    batches = dense.cached_batches(encoded_batches, **options)
  else:
    batches = dense.training_batches(
      setup.features, read, count, steps=protocol.steps, **options
    )
  params, state = probe_heads.init_depth_head(
    head, setup.channels, seed=setup.seed
  )
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
  setup: Setup, data: DenseSet, fitted: probe.FitResult
) -> Iterator[Prediction]:
  """Yields each image's prediction at image size.

  Depth is in metres, clipped to 1 mm .. `max_depth`; `tta="flip"` averages
  with the flipped prediction of the flipped image.
  """
  size = setup.example(data, 0).size
  view, use_flip = setup.view(size, size), setup.protocol.tta == "flip"
  batch_size = setup.protocol.batch_size
  predict_depth = probe_heads.predict_fn(
    setup.head,
    [(fitted.params, fitted.state["head"])],
    mesh=setup.encoder.mesh,
    batch_size=batch_size * (2 if use_flip else 1),
    finish=setup.target.decode,
  )
  read = functools.partial(setup.example, data)
  examples = shared_map(read, range(len(data.images)))
  while batch := list(itertools.islice(examples, batch_size)):
    images = [example.image for example in batch]
    if use_flip:
      images += [image[:, ::-1] for image in images]
    features = setup.features([view.pad(image) for image in images])
    (maps,) = predict_depth(features)
    maps = view.restore(maps)
    if use_flip:
      maps = (maps[: len(batch)] + maps[len(batch) :, :, ::-1]) / 2
    for example, depth in zip(batch, maps, strict=True):
      yield example.image, example.depth, setup.target.finish(depth)


def _log_error(predicted, truth, valid):
  """ln(d + 0.001) - ln(g + 0.001); 0 for invalid pixels."""
  # Masked before and after the log, whose gradient may be non-finite.
  predicted, truth = (jnp.where(valid, x, 1.0) for x in (predicted, truth))
  error = jnp.log(predicted + _EPS) - jnp.log(truth + _EPS)
  return jnp.where(valid, error, 0.0)


def sig_loss(
  predicted: Maps,
  truth: Maps,
  valid: Bool[Array, "b h w"],
  *,
  ddof: int = 1,
  variance_weight: Scalar | float = 1.0,
) -> Float[Array, ""]:
  """Scale-invariant log error: sqrt(var g + 0.15 (mean g)^2).

  Eigen et al. 2014, with the root and the constants of AdaBins. The variance is
  unbiased in DINOv2's probes and biased in Probe3D's, which writes
  mean g^2 - 0.85 (mean g)^2.

  Depth is in metres; the loss is 0 if no pixel is valid. `ddof` is 1 for the
  unbiased variance; `variance_weight` is 0 during warmup.
  """
  g = _log_error(predicted, truth, valid)
  count = valid.sum().astype(jnp.float32)
  mean = g.sum() / jnp.maximum(count, 1)
  squares = jnp.where(valid, jnp.square(g - mean), 0.0).sum()
  variance = squares / jnp.maximum(count - ddof, 1)
  radicand = variance_weight * variance + _MEAN_WEIGHT * jnp.square(mean)
  # The root isn't differentiable at 0, which a perfect prediction reaches.
  return jnp.where(count > 0, jnp.sqrt(jnp.maximum(radicand, 1e-12)), 0.0)


def gradient_loss(
  predicted: Maps, truth: Maps, valid: Bool[Array, "b h w"]
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
