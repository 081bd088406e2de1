"""Depth probe: metric depth from frozen features (NYUv2).

Trains a head on frozen features and reports RMSE, AbsRel, delta and more.
`training.py` defines the published probes: DINOv3's linear probe (the default),
DINOv2's over one or four layers, and Probe3D's DPT. Results of different
protocols are not comparable.

The surface-normal probe is Probe3D's (El Banani et al. 2024): its DPT head over
four blocks predicts a normal and a concentration for every pixel, trained with
the angular loss with uncertainty (Bae et al. 2021).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import examples, probe
from mtv_jax.evals.core.base import NotApplicable, Result
from mtv_jax.evals.core.examples import DenseSet, DepthSet, NormalSet
from mtv_jax.evals.datasets import registry, scenes
from mtv_jax.evals.depth import augment, metrics, training
from mtv_jax.evals.depth.metrics import DepthEvaluator
from mtv_jax.evals.depth.training import PROTOCOLS, ProbeProtocol, Setup
from mtv_jax.parallel.distributed import shared_map
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError

_MAX_DEPTH = {"nyu": 10.0, "scenes": scenes.MAX_DEPTH}
# Short schedules for scenes: a quick check in seconds instead of hours.
_SCENE_SCHEDULES = {
  "linear": {"steps": 300, "lr": 1e-2},
  "lin1": {"steps": 100, "lr": 1e-2},
  "lin4": {"steps": 100, "lr": 1e-2},
  "dpt": {"steps": 40, "lr": 3e-3, "batch_size": 4},
  "probe3d": {"steps": 60, "lr": 3e-3, "batch_size": 4},
}
_HEADS = {
  "dpt": "Probe3D's DPT, {} channels",
  "upsampled": "1x1 convolution, upsampled x4",
  "linear": "batch norm, 1x1 convolution",
}
# Protocol fields that are also options.
_OPTIONS = ("steps", "lr", "batch_size", "augment", "tta", "crop")
_MEAN_IMAGES = 64  # training images for the mean depth


@dataclasses.dataclass(frozen=True)
class DepthProbe(DepthEvaluator):
  """Depth probe.

  None means the published value on real data and a small value on scenes.

  Attributes:
    protocol: see `training.py`.
    layers: blocks to read instead of the protocol's, without the final norm.
    cls: `concat` appends the CLS token, if any, to every patch; the default for
      `lin1`, `lin4`, and for `dpt` with the DINO family.
    train_count: training images to use, evenly spaced; all by default.
    published: trains the full published schedule, even on scenes or few
      images; by default capped at 100 epochs (`probe.resolve_schedule`).
    lr: peak learning rate.
    augment: training augmentation, see `augment.py`.
    input_size: rows and columns that whole images are resized to for encoding;
      the image's size by default, at which depth is scored.
    tta: `flip` averages the predictions of image and mirror image.
    crop: evaluated pixels, see `metrics.crop_mask`.
    max_depth: largest depth of bins and evaluated pixels, in metres.
    dpt_features: channels of the DPT head.
  """

  # `batch_size` is the training batch size, so metrics depend on it.
  _neutral = DepthEvaluator._neutral - {"batch_size"}

  protocol: Literal["linear", "lin1", "lin4", "dpt"] = "linear"
  layers: tuple[int, ...] | None = None
  cls: Literal["concat", "off"] | None = None
  train_count: PositiveInt | None = None
  published: bool = False
  steps: PositiveInt | None = None
  lr: PositiveFloat | None = None
  batch_size: PositiveInt | None = None
  augment: Literal["toolbox", "probe3d", "flip", "none"] | None = None
  input_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
  tta: Literal["flip", "none"] | None = None
  crop: metrics.CropName | None = None
  max_depth: PositiveFloat | None = None
  dpt_features: PositiveInt | None = None
  seed: int = 0

  def _set(self, split: str, size: int) -> DenseSet:
    if registry.depth_kind(self.data) == "kitti":
      raise NotApplicable(
        f"data={str(self.data)!r} is KITTI, but the depth probe's protocols "
        "(training crops of 480 x 640, 10 m) are NYUv2's; use relative_depth"
      )
    count = self.train_count if split == "train" else self.count
    return self.open_split(split, size, count=count)

  def prepare(self) -> None:
    """Opens both splits, so that missing files fail early."""
    for split in registry.SPLITS:
      self._set(split, augment.NYU_SIZE[0])

  def run(self, encoder: Encoder) -> Result:
    """Trains the head and scores the test split.

    `chance` scores the mean depth of the training images.
    """
    size = encoder.preprocess.size
    train, test = self._set("train", size), self._set("test", size)
    setup = self._resolve_setup(encoder, train)
    fit_result = training.train(setup, train)
    limits = {"high": setup.target.max_depth}
    valid_mask = functools.partial(self._valid_mask, **limits)
    protocol = self._protocol(setup, train, test)
    protocol["train_loss"] = float(np.mean(fit_result.losses[-10:]))
    return self._score_images(
      training.predict(setup, test, fit_result),
      self._score_fn(_average_target(train, setup, valid_mask)),
      protocol,
      crop=setup.protocol.crop,
      **limits,
    )

  def _score_fn(self, mean: float) -> Callable[..., dict[str, float]]:
    scale_invariant = self.protocol == "dpt"
    return functools.partial(score, mean=mean, scale_invariant=scale_invariant)

  def _make_target(self, kind: str) -> Any:
    return training.DepthTarget(self.max_depth or _MAX_DEPTH[kind])

  def _resolve_setup(self, encoder: Encoder, train: DenseSet) -> Setup:
    """Published values, overridden by scenes' defaults, then by options."""
    options, dpt_features = {}, 512
    if train.kind == "scenes":
      options = {"augment": "none", "crop": "none"}
      options |= {} if self.published else _SCENE_SCHEDULES[self.protocol]
      dpt_features = 16
    field_values = {name: getattr(self, name) for name in (*_OPTIONS, "cls")}
    options |= {
      k: value for k, value in field_values.items() if value is not None
    }
    if self.layers is not None:
      options["norm"] = "none"
    protocol = dataclasses.replace(PROTOCOLS[self.protocol], **options)
    schedule = self._schedule(protocol, train)
    schedule.warn("depth_probe")
    protocol = dataclasses.replace(
      protocol,
      steps=schedule.steps,
      batch_size=schedule.batch_size,
      # At most a tenth, so that a short run isn't all warmup.
      warm_steps=min(protocol.warm_steps, schedule.steps // 10),
    )
    size = self.input_size
    return Setup(
      encoder=encoder,
      protocol=protocol,
      layers=tuple(
        self.layers or protocol.out_indices(encoder.spec.image.depth)
      ),
      target=self._make_target(train.kind),
      dpt_features=self.dpt_features or dpt_features,
      input_size=(size, size) if isinstance(size, int) else size,
      seed=self.seed,
      schedule=schedule,
    )

  def _schedule(
    self, protocol: ProbeProtocol, train: DenseSet
  ) -> probe.ProbeSchedule:
    batch_size, num_images = protocol.batch_size, len(train.images)
    if protocol.steps is None:
      steps = protocol.epochs * max(1, num_images // batch_size)
      return probe.ProbeSchedule(steps, batch_size, f"{protocol.epochs} epochs")
    published = protocol.steps, batch_size
    return probe.resolve_schedule(
      published,
      images=num_images,
      steps=self.steps,
      batch_size=self.batch_size,
      uncapped=self.published,
      scenes=published if train.kind == "scenes" else None,
    )

  def _protocol(
    self, setup: Setup, train: DenseSet, test: DenseSet
  ) -> dict[str, Any]:
    protocol, encoder = setup.protocol, setup.encoder
    size = setup.example(test, 0).size
    view = setup.view(size, size)
    return {
      **encoder.protocol(),
      "data": test.name,
      "data_hash": test.digest,
      "train_hash": train.digest,
      "train_images": len(train.images),
      **self._target_protocol(setup, test),
      "protocol": self.protocol,
      "frame": protocol.frame,
      "schedule": protocol.schedule,
      "schedule_length": setup.schedule.why,
      **{name: getattr(protocol, name) for name in _OPTIONS},
      "image_size": list(size),
      "input_size": list(view.input_size),
      "input_padded": list(view.padded),
      "preprocess": {
        "resize": "none" if view.input_size == size else "area or bilinear",
        "padding": "mean colour around, cut off the prediction",
        "mean": list(encoder.preprocess.mean),
        "std": list(encoder.preprocess.std),
      },
      "layers": list(setup.layers),
      "final_norm": protocol.norm == "final",
      "cls_token": "beside every patch" if setup.has_cls else "not read",
      "head": _HEADS[protocol.head].format(setup.dpt_features),
      "prediction_resize": protocol.resize,
      "optimizer": (
        f"AdamW, betas {protocol.b1} {protocol.b2}, weight decay "
        f"{protocol.weight_decay:g}, clip {protocol.clip}"
      ),
      "seed": setup.seed,
      "averaging": metrics.AVERAGING,
    }

  def _target_protocol(self, setup: Setup, test: DepthSet) -> dict[str, Any]:
    protocol, high = setup.protocol, setup.target.max_depth
    return {
      "depth": test.source,
      "bins": f"{training.BINS}, {training.MIN_DEPTH} m to max_depth",
      "max_depth": high,
      "loss": (
        f"{protocol.sig_weight:g} sig (ddof {protocol.ddof}, mean only for the "
        f"first {protocol.warm_steps} steps) + "
        f"{protocol.gradient_weight:g} gradient"
      ),
      "valid": f"1 mm < depth < {high:g} m",
      "chance": "the mean depth of training images, everywhere",
    }


def score(
  predicted: metrics.Pixels | None,
  truth: metrics.Pixels,
  *,
  mean: float,
  scale_invariant: bool,
) -> dict[str, float]:
  """Metrics over the valid pixels of one image."""
  is_chance = predicted is None
  predicted = np.full(len(truth), mean) if is_chance else predicted
  scores = metrics.image_metrics(predicted, truth)
  if scale_invariant:
    affine = metrics.fit_affine(predicted, truth)
    if is_chance:
      mean_depth = float(np.mean(truth, dtype=np.float64))
      affine = metrics.ScaleAndShift(0.0, mean_depth)
    names = ("rmse", *metrics.DELTAS)
    aligned = metrics.image_metrics(affine(predicted), truth, names)
    scores |= {f"si_{name}": value for name, value in aligned.items()}
  return scores


def _average_target(
  data: DenseSet, setup: Setup, valid_mask: Callable[[np.ndarray], np.ndarray]
) -> Any:
  """Mean depth or normal over the valid pixels of some training images."""
  total, count = np.float64(0), 0
  indices = examples.subsample(range(len(data.maps)), _MEAN_IMAGES)
  for values in shared_map(lambda i: setup.example(data, i).depth, indices):
    valid = valid_mask(values)
    total = total + values[valid].sum(axis=0, dtype=np.float64)
    count += int(valid.sum())
  if not count:
    raise InputError(
      f"{data.name}: no training image has a valid pixel; check the depth "
      "files, their unit and max_depth"
    )
  return total / count


# Metrics in degrees, where lower is better.
ANGLES = ("rmse", "mean", "median")
THRESHOLDS = (11.25, 22.5, 30.0)
# Cosines are clipped to this distance from -1 and 1, where the gradient of the
# angle is infinite.
_EPS = 1e-4


@dataclasses.dataclass(frozen=True)
class NormalsTarget:
  """A normal and its concentration, see `training.DepthTarget`."""

  outputs, max_depth = 4, None

  def decode(self, logits: Float[Array, "b h w 4"]) -> Float[Array, "b 4 h w"]:
    return jnp.moveaxis(logits, -1, 1)

  def loss(self, maps, truth, protocol, step):
    valid = jnp.isfinite(truth).all(-1)
    return angular_loss(jnp.moveaxis(maps, 1, -1), truth, valid)

  def finish(self, maps: np.ndarray) -> np.ndarray:
    return _normalize(np.moveaxis(maps[:3], 0, -1), np)


@dataclasses.dataclass(frozen=True)
class NormalsProbe(DepthProbe):
  """Surface-normal probe; options as in `DepthProbe`.

  Attributes:
    truth: `raw` or `filled` depth, for NYUv2 layouts with both, if normals are
      computed from depth.
  """

  protocol: Literal["probe3d"] = "probe3d"
  augment: Literal["probe3d", "none"] | None = None
  tta: Literal["none"] | None = None

  title = "surface normals"
  _units: ClassVar[dict[str, str]] = dict.fromkeys(ANGLES, "degrees")
  _kind: ClassVar[str] = "normals"

  def _valid_mask(self, truth, *, high=None, crop="none"):
    mask = metrics.crop_mask(truth.shape[:2], crop)
    return mask & np.isfinite(truth).all(-1)

  def _draw_row(self, image, truth, predicted, valid) -> np.ndarray:
    colours = [
      (127.5 * (np.nan_to_num(x, nan=-1) + 1)).astype(np.uint8)
      for x in (np.where(valid[..., None], truth, np.nan), predicted)
    ]
    image = image.astype(np.uint8)
    return plots.image_with_maps(image, colours, height=plots.THIRD)

  def _make_target(self, kind: str) -> NormalsTarget:
    return NormalsTarget()

  def _score_fn(self, mean: np.ndarray) -> Callable[..., dict[str, float]]:
    return functools.partial(score_normals, mean=mean)

  def _target_protocol(self, setup: Setup, test: NormalSet) -> dict[str, Any]:
    return {
      "normals": test.source,
      "train_normals": self._set("train", setup.encoder.preprocess.size).source,
      "loss": "angle with uncertainty (Bae et al. 2021), elu + 1.01",
      "valid": "pixels with a normal",
      "chance": "the mean normal of training images, everywhere",
    }


def _normalize(x, xnp):
  squares = xnp.square(x).sum(-1, keepdims=True)
  return x / xnp.sqrt(xnp.maximum(squares, 1e-16))


def angular_loss(
  predicted: Float[Array, "b h w 4"],
  truth: Float[Array, "b h w 3"],
  valid: Bool[Array, "b h w"],
) -> Float[Array, ""]:
  """Angular loss with uncertainty (Bae et al. 2021, equation 4).

      mean ln(1 + exp(-pi k)) - ln(k^2 + 1) + k angle

  over the valid pixels, with k = elu(predicted[..., 3]) + 1.01 as in Probe3D;
  0 if no pixel is valid.
  """
  truth = jnp.where(valid[..., None], truth, 0.0)
  normals = _normalize(predicted[..., :3], jnp)
  cosine = (normals * _normalize(truth, jnp)).sum(-1)
  angle = jnp.arccos(jnp.clip(cosine, _EPS - 1, 1 - _EPS))
  k = jax.nn.elu(predicted[..., 3]) + 1.01
  loss = jnp.log1p(jnp.exp(-jnp.pi * k)) - jnp.log1p(jnp.square(k)) + k * angle
  total = jnp.where(valid, loss, 0.0).sum()
  return total / jnp.maximum(valid.sum(), 1)


def score_normals(
  predicted: Float[np.ndarray, "n 3"] | None,
  truth: Float[np.ndarray, "n 3"],
  *,
  mean: Float64[np.ndarray, "3"],
) -> dict[str, float]:
  """Angular errors in degrees over the valid pixels of one image.

  `within_11.25` is the fraction of pixels with a smaller error. If `predicted`
  is None, the direction of `mean` is scored.
  """
  predicted = np.asarray([mean]) if predicted is None else predicted
  normals = _normalize(predicted.astype(np.float64), np)
  cosine = (normals * _normalize(truth.astype(np.float64), np)).sum(-1)
  error = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
  values = (np.sqrt(np.mean(error**2)), error.mean(), np.median(error))
  angles = dict(zip(ANGLES, map(float, values), strict=True))
  return angles | {
    f"within_{limit:g}": float(np.mean(error < limit)) for limit in THRESHOLDS
  }
