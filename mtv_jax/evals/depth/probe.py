"""Depth probe: metric depth from frozen features (NYUv2).

A head is trained on frozen features and scored by RMSE, AbsRel, delta and
others. `protocols.py` has the published probes: DINOv3's linear probe (the
default), DINOv2's over one or four layers, Probe3D's DPT; `heads.py` the heads,
`losses.py` the loss, `training.py` the training, `metrics.py` the metrics.
Results of different protocols are not comparable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable, Result
from mtv_jax.evals.core.examples import Data, DepthSet
from mtv_jax.evals.datasets import registry, scenes
from mtv_jax.evals.depth import augment, heads, metrics, training
from mtv_jax.evals.depth.base import DepthEvaluator, depth_row
from mtv_jax.evals.depth.protocols import PROTOCOLS
from mtv_jax.evals.depth.training import Setup
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError

_MAX_DEPTH = {"nyu": 10.0, "scenes": scenes.MAX_DEPTH}
# Scenes are a quick check, of seconds instead of hours.
_SCENES = {
  "linear": {"steps": 300, "lr": 1e-2},
  "lin1": {"steps": 100, "lr": 1e-2},
  "lin4": {"steps": 100, "lr": 1e-2},
  "dpt": {"steps": 40, "lr": 3e-3, "batch_size": 4},
}
_SCENES_DPT_FEATURES = 16
_MEAN_IMAGES = 64  # training images behind the mean depth


@dataclasses.dataclass(frozen=True)
class DepthProbe(DepthEvaluator):
  """A depth probe.

  An option of None is as published for real data, and small for scenes.

  Attributes:
    data: the scenes or NYUv2, see `datasets/registry.py`; not KITTI.
    protocol: `linear`, `lin1`, `lin4` or `dpt`, see `protocols.py`.
    layers: blocks to read instead of the protocol's; without the final norm.
    train_count: training images to use, evenly spaced; all by default.
    count: test images to use, evenly spaced; all by default.
    truth: NYUv2's `raw` or `filled` depth, where a layout has both.
    steps: updates.
    lr: peak learning rate.
    batch_size: images a step.
    augment: of training images: `toolbox`, `probe3d`, `flip` or `none`.
    input_size: rows and columns to which a whole image is resized before it is
      encoded; its own by default. Depth is compared at the image's size.
    tta: `flip` or `none`.
    crop: of the evaluated pixels: `nyu_eigen`, `garg`, `kitti_eigen`, `none`.
    max_depth: metres.
    dpt_features: channels of the DPT head.
    seed: of all randomness.
    pictures: number of test images on the sheet.
  """

  data: Data = "scenes"
  protocol: str = "linear"
  layers: tuple[int, ...] | None = None
  train_count: int | None = None
  count: int | None = None
  truth: str | None = None
  steps: int | None = None
  lr: float | int | None = None
  batch_size: int | None = None
  augment: str | None = None
  input_size: int | tuple[int, int] | None = None
  tta: str | None = None
  crop: str | None = None
  max_depth: float | int | None = None
  dpt_features: int | None = None
  seed: int = 0
  pictures: int = 0

  def __post_init__(self):
    self.check_choices(
      "depth_probe",
      protocol=PROTOCOLS,
      augment=augment.AUGMENTS,
      tta=("flip", "none"),
      crop=metrics.CROPS,
    )

  def _set(self, split: str, size: int) -> DepthSet:
    if registry.depth_kind(self.data) == "kitti":
      raise NotApplicable(
        f"data={str(self.data)!r} is KITTI, and the depth probe's protocols "
        "(training crops of 480 x 640, 10 m) are NYUv2's; for KITTI there is "
        "relative_depth"
      )
    count = self.train_count if split == "train" else self.count
    return self.open_split(split, size, count=count)

  def prepare(self) -> None:
    """Reads the lists of files, so that missing files show."""
    for split in registry.SPLITS:
      self._set(split, augment.NYU_SIZE[0])

  def run(self, encoder: Encoder) -> Result:
    """Trains the head and scores the test split.

    `chance` is the score of the mean depth of the training images.
    """
    size = encoder.preprocess.size
    train, test = self._set("train", size), self._set("test", size)
    setup = self._resolve(encoder, train)
    head = setup.head(encoder)
    fitted = training.train(encoder, train, setup, head=head)
    mean = _mean_depth(train, setup)
    scores, chance, rows = [], [], []
    for one in training.predict(encoder, test, setup, head=head, fitted=fitted):
      valid = metrics.valid_mask(
        one.truth, high=setup.max_depth, crop=setup.protocol.crop
      )
      truth = one.truth[valid]
      scores.append(self._score(one.depth[valid], truth))
      chance.append(self._score(np.full(len(truth), mean), truth))
      if len(rows) < self.pictures:
        rows.append(depth_row(one.image, one.truth, one.depth, valid))
    summary = metrics.average(scores)
    return Result(
      summary.metrics,
      self._protocol(encoder, setup, train, test)
      | {
        "images": summary.images,
        "images_skipped": summary.skipped,
        "train_loss": float(np.mean(fitted.losses[-10:])),
      },
      metrics.average(chance).metrics,
      units=summary.units,
      lower=tuple(summary.units),
      pictures={"depth": plots.vstack(rows)} if rows else {},
    )

  def _score(
    self, predicted: np.ndarray, truth: np.ndarray
  ) -> dict[str, float] | None:
    if not truth.size:
      return None
    scores = metrics.image_metrics(predicted, truth)
    if self.protocol == "dpt":
      aligned = metrics.fit_affine(predicted, truth)(predicted)
      scores["si_rmse"] = metrics.rmse(aligned, truth)
      for k in (1, 2, 3):
        scores[f"si_delta{k}"] = metrics.delta(aligned, truth, k)
    return scores

  def _resolve(self, encoder: Encoder, train: DepthSet) -> Setup:
    """The published values, then those for scenes, then the options."""
    protocol = PROTOCOLS[self.protocol]
    dpt_features = 512
    if train.kind == "scenes":
      protocol = dataclasses.replace(
        protocol, augment="none", crop="none", **_SCENES[self.protocol]
      )
      dpt_features = _SCENES_DPT_FEATURES
    names = ("steps", "lr", "batch_size", "augment", "tta", "crop")
    options = {name: getattr(self, name) for name in names}
    options = {name: v for name, v in options.items() if v is not None}
    if self.layers is not None:
      options["norm"] = "none"
    protocol = dataclasses.replace(protocol, **options)
    steps = protocol.steps
    if steps is None:
      batches = max(1, len(train.images) // protocol.batch_size)
      steps = protocol.epochs * batches
    protocol = dataclasses.replace(
      protocol,
      steps=steps,
      lr=float(protocol.lr),
      # A tenth at most, so that a short run is not all warm-up.
      warm_steps=min(protocol.warm_steps, steps // 10),
    )
    size = self.input_size
    return Setup(
      protocol=protocol,
      layers=tuple(self.layers or protocol.taps(encoder.spec.image.depth)),
      max_depth=float(self.max_depth or _MAX_DEPTH[train.kind]),
      dpt_features=self.dpt_features or dpt_features,
      input_size=(size, size) if isinstance(size, int) else size,
      seed=self.seed,
    )

  def _protocol(
    self, encoder: Encoder, setup: Setup, train: DepthSet, test: DepthSet
  ) -> dict[str, Any]:
    protocol = setup.protocol
    size = setup.example(test, 0).depth.shape
    view = setup.view(encoder, size, size)
    token = protocol.cls == "concat" and encoder.spec.image.cls_token
    return {
      **encoder.protocol(),
      "data": test.name,
      "data_hash": test.digest,
      "train_hash": train.digest,
      "train_images": len(train.images),
      "depth": test.source,
      "protocol": self.protocol,
      "frame": protocol.frame,
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
      "cls_token": "beside every patch" if token else "not read",
      "head": {
        "dpt": f"Probe3D's DPT, {setup.dpt_features} channels",
        "upsampled": "1x1 convolution, upsampled x4",
        "linear": "batch norm, 1x1 convolution",
      }[protocol.head],
      "bins": f"{heads.BINS}, {heads.MIN_DEPTH} m to max_depth",
      "max_depth": setup.max_depth,
      "prediction_resize": protocol.resize,
      "loss": (
        f"{protocol.sig_weight:g} sig (ddof {protocol.ddof}, mean only for the "
        f"first {protocol.warm_steps} steps) + "
        f"{protocol.gradient_weight:g} gradient"
      ),
      "optimizer": (
        f"AdamW, betas {protocol.b1} {protocol.b2}, weight decay "
        f"{protocol.weight_decay:g}, clip {protocol.clip}"
      ),
      "lr": protocol.lr,
      "schedule": protocol.schedule,
      "steps": protocol.steps,
      "batch_size": protocol.batch_size,
      "augment": protocol.augment,
      "seed": setup.seed,
      "tta": protocol.tta,
      "crop": protocol.crop,
      "valid": f"1 mm < depth < {setup.max_depth:g} m",
      "averaging": metrics.AVERAGING,
      "chance": "the mean depth of training images, everywhere",
    }


def _mean_depth(data: DepthSet, setup: Setup) -> float:
  """Mean over the valid pixels of some training images, in metres."""
  chosen = examples.subsample(range(len(data.depths)), _MEAN_IMAGES)
  total, count = 0.0, 0
  for i in chosen:
    depth = setup.example(data, i).depth
    valid = metrics.valid_mask(depth, high=setup.max_depth)
    total += float(depth[valid].sum(dtype=np.float64))
    count += int(valid.sum())
  if not count:
    raise InputError(
      f"{data.name}: none of {len(chosen)} training images has a valid depth "
      f"below {setup.max_depth:g} m: the unit of the depth files doesn't fit"
    )
  return total / count
