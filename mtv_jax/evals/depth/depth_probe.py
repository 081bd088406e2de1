"""Depth probe: metric depth from frozen features (NYUv2).

Trains a head on frozen features and reports RMSE, AbsRel, delta and more.
`training.py` defines the published probes: DINOv3's linear probe (the default),
DINOv2's over one or four layers, and Probe3D's DPT. Results of different
protocols are not comparable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import examples, probe
from mtv_jax.evals.core.base import NotApplicable, Result
from mtv_jax.evals.core.examples import DenseSet, DepthSet
from mtv_jax.evals.datasets import registry, scenes
from mtv_jax.evals.depth import augment, metrics, training
from mtv_jax.evals.depth.metrics import DepthEvaluator
from mtv_jax.evals.depth.training import PROTOCOLS, ProbeProtocol, Setup
from mtv_jax.parallel.distributed import shared_map
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
    """Steps and batch size for this data."""
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
    """Protocol entries on the target, its loss and its valid pixels."""
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
