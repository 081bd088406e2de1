"""Metric depth from frozen features through a small head (NYUv2's probe).

Three published protocols, `depth_recipes.py`: DINOv3's linear probe (the
default), DINOv2's over one or four layers, and Probe3D's DPT. All share the
metrics of `depth_metrics.py`; figures of different protocols don't compare.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.examples import Data, DepthSet
from mtv_jax.evals.datasets import (
  registry,
  scenes,
)
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.evals.depth import (
  augment as depth_augment,
)
from mtv_jax.evals.depth import (
  heads as depth_heads,
)
from mtv_jax.evals.depth import (
  metrics as depth_metrics,
)
from mtv_jax.evals.depth import (
  protocols as depth_recipes,
)
from mtv_jax.evals.depth import (
  sheet as depth_sheet,
)
from mtv_jax.evals.depth import (
  training as depth_training,
)
from mtv_jax.evals.depth.training import Setup
from mtv_jax.utils import plots
from mtv_jax.utils.errors import did_you_mean

_MAX_DEPTH = {"nyu": 10.0, "scenes": scenes.MAX_DEPTH}
# Scenes stand in for a data set, and have seconds instead of hours.
_SCENES = {
  "linear": {"steps": 300, "lr": 1e-2},
  "lin1": {"steps": 100, "lr": 1e-2},
  "lin4": {"steps": 100, "lr": 1e-2},
  "dpt": {"steps": 40, "lr": 3e-3, "batch_size": 4, "dpt_features": 16},
}
_FLOOR_MAPS = 64


@dataclasses.dataclass(frozen=True)
class DepthProbe(Evaluator):
  """A depth probe.

  What is None is as published for real data, and small for scenes.

  Attributes:
    data: the scenes or NYUv2, see `datasets/registry.py`; not KITTI.
    protocol: `linear`, `lin1`, `lin4` or `dpt`, see `depth_recipes.py`.
    layers: blocks to read in place of the protocol's; without the final norm.
    train_count: training images to use, evenly spaced; all by default.
    count: test images to use, evenly spaced; all by default.
    truth: NYUv2's `raw` or `filled` depth, where a layout has both.
    steps: updates.
    lr: peak learning rate.
    batch_size: images a step.
    augment: of training images: `toolbox`, `probe3d`, `flip` or `none`.
    input_size: rows and columns to which a whole image is brought before it is
      encoded; its own by default. Depth is compared at the image's size.
    tta: `flip` or `none`.
    crop: of the evaluated pixels: `nyu_eigen`, `garg`, `kitti_eigen`, `none`.
    max_depth: metres.
    dpt_features: channels of the DPT head.
    seed: of everything random.
    pictures: how many test images a sheet shows.
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
    depth_recipes.recipe(self.protocol)
    for name, choices in (
      ("augment", depth_augment.AUGMENTS),
      ("tta", ("flip", "none")),
      ("crop", depth_metrics.CROPS),
    ):
      value = getattr(self, name)
      if value is not None and value not in choices:
        raise ValueError(
          f"depth_probe: {name}={value!r}. {did_you_mean(value, choices)}"
        )

  @functools.cached_property
  def _opened(self) -> dict[tuple[str, int], DepthSet]:
    return {}

  def _set(self, split: str, size: int) -> DepthSet:
    """A split, opened once; `size` is that of scenes."""
    if registry.depth_kind(self.data) == "kitti":
      raise NotApplicable(
        f"data={str(self.data)!r} is KITTI, and the depth probe's protocols "
        "(crops of 480 x 640 to train on, 10 m) are NYUv2's; for KITTI there "
        "is relative_depth"
      )
    size = size if is_scenes(self.data) else 0
    if (split, size) not in self._opened:
      self._opened[split, size] = registry.open_depth(
        self.data,
        split=split,
        size=size,
        count=self.train_count if split == "train" else self.count,
        truth=self.truth,
      )
    return self._opened[split, size]

  def prepare(self) -> None:
    """Reads lists, so that missing files show."""
    for split in registry.SPLITS:
      self._set(split, depth_augment.NYU_SIZE[0])

  def run(self, encoder: Encoder) -> Result:
    """Trains the head, then the metrics of `depth_metrics` on the test split.

    `chance` is what predicting the mean depth of the training images gets.
    """
    size = encoder.preprocess.size
    train, test = self._set("train", size), self._set("test", size)
    setup = self._resolve(encoder, train)
    head = setup.head(encoder)
    fitted = depth_training.train(encoder, train, setup, head=head)
    mean = _mean_depth(train, setup)
    rows, floor, pictures = [], [], []
    for found in depth_training.predictions(
      encoder, test, setup, head=head, fitted=fitted
    ):
      valid = depth_metrics.valid_mask(
        found.truth, high=setup.max_depth, crop=setup.crop
      )
      rows.append(self._score(found.depth[valid], found.truth[valid]))
      guess = np.full(int(valid.sum()), mean)
      floor.append(self._score(guess, found.truth[valid]))
      if len(pictures) < self.pictures:
        pictures.append(
          depth_sheet.depth_row(found.image, found.truth, found.depth, valid)
        )
    summary = depth_metrics.summarise(rows)
    return Result(
      summary.metrics,
      self._protocol(encoder, setup, train, test, summary, fitted.losses),
      depth_metrics.summarise(floor).metrics,
      units=_named(depth_metrics.UNITS, summary.metrics),
      lower=tuple(_named(depth_metrics.UNITS, summary.metrics)),
      pictures={"depth": plots.vstack(pictures)} if pictures else {},
    )

  def _score(
    self, predicted: np.ndarray, truth: np.ndarray
  ) -> dict[str, float] | None:
    if not truth.size:
      return None
    scores = depth_metrics.image_metrics(predicted, truth)
    if self.protocol == "dpt":
      aligned = depth_metrics.fit_affine(predicted, truth)(predicted)
      scores["si_rmse"] = depth_metrics.rmse(aligned, truth)
      for k in (1, 2, 3):
        scores[f"si_delta{k}"] = depth_metrics.delta(aligned, truth, k)
    return scores

  def _resolve(self, encoder: Encoder, train: DepthSet) -> Setup:
    """The options, the published values behind them, and those of scenes."""
    recipe = depth_recipes.recipe(self.protocol)
    small = _SCENES[self.protocol] if train.kind == "scenes" else {}
    batch = self.batch_size or small.get("batch_size") or recipe.batch_size
    steps = self.steps or small.get("steps") or recipe.steps
    if steps is None:
      steps = recipe.epochs * max(1, len(train.images) // batch)
    size = self.input_size
    depth = encoder.spec.image.depth
    if self.layers is not None:
      recipe = dataclasses.replace(recipe, norm="none")
    return Setup(
      recipe=recipe,
      layers=tuple(self.layers or recipe.taps(depth)),
      augment=self.augment or ("none" if small else recipe.augment),
      steps=steps,
      lr=float(self.lr or small.get("lr") or recipe.lr),
      batch_size=batch,
      max_depth=float(self.max_depth or _MAX_DEPTH[train.kind]),
      dpt_features=self.dpt_features or small.get("dpt_features") or 512,
      input_size=(size, size) if isinstance(size, int) else size,
      # A tenth at most, so that a short run is not all warm-up.
      warm_steps=min(recipe.warm_steps, steps // 10),
      tta=self.tta or recipe.tta,
      crop=self.crop or (recipe.crop if train.kind == "nyu" else "none"),
      seed=self.seed,
    )

  def _protocol(
    self,
    encoder: Encoder,
    setup: Setup,
    train: DepthSet,
    test: DepthSet,
    summary: depth_metrics.Summary,
    losses: np.ndarray,
  ) -> dict[str, Any]:
    recipe = setup.recipe
    size = setup.example(test, 0).depth.shape
    view = setup.view(encoder, size, size)
    token = recipe.cls == "concat" and encoder.spec.image.cls_token
    return {
      **encoder.protocol(),
      "data": test.name,
      "data_hash": test.digest,
      "train_hash": train.digest,
      "images": summary.images,
      "images_skipped": summary.skipped,
      "train_images": len(train.images),
      "depth": test.source,
      "protocol": self.protocol,
      "frame": recipe.frame,
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
      "final_norm": recipe.norm == "final",
      "cls_token": "beside every patch" if token else "not read",
      "head": self._head(setup),
      "bins": f"{depth_heads.BINS}, {depth_heads.MIN_DEPTH} m to max_depth",
      "max_depth": setup.max_depth,
      "prediction_resize": recipe.resize,
      "loss": (
        f"{recipe.sig_weight:g} sig (ddof {recipe.ddof}, mean only for the "
        f"first {setup.warm_steps} steps) + {recipe.gradient_weight:g} gradient"
      ),
      "optimizer": (
        f"AdamW, betas {recipe.b1} {recipe.b2}, weight decay "
        f"{recipe.weight_decay:g}, clip {recipe.clip}"
      ),
      "lr": setup.lr,
      "schedule": recipe.schedule,
      "steps": setup.steps,
      "batch_size": setup.batch_size,
      "augment": setup.augment,
      "seed": setup.seed,
      "train_loss": float(np.mean(losses[-10:])),
      "tta": setup.tta,
      "crop": setup.crop,
      "valid": f"1 mm < depth < {setup.max_depth:g} m",
      "averaging": depth_metrics.AVERAGING,
      "chance": "the mean depth of training images, everywhere",
    }

  def _head(self, setup: Setup) -> str:
    if setup.recipe.head == "dpt":
      return f"Probe3D's DPT, {setup.dpt_features} channels"
    if setup.recipe.head == "upsampled":
      return "1x1 convolution, upsampled x4"
    return "batch norm, 1x1 convolution"


def _named(units: dict[str, str], metrics: dict[str, float]) -> dict[str, str]:
  """The units of the metrics there are, also of those after alignment."""
  return {
    m: units[m.removeprefix("si_")]
    for m in metrics
    if m.removeprefix("si_") in units
  }


def _mean_depth(data: DepthSet, setup: Setup) -> float:
  """Of the valid pixels of some training images, in metres."""
  some = examples.subsample(range(len(data.depths)), _FLOOR_MAPS)
  total, count = 0.0, 0
  for i in some:
    depth = setup.example(data, i).depth
    valid = depth_metrics.valid_mask(depth, high=setup.max_depth)
    total += float(depth[valid].sum(dtype=np.float64))
    count += int(valid.sum())
  if not count:
    raise ValueError(
      f"{data.name}: none of {len(some)} training images has a valid depth "
      f"below {setup.max_depth:g} m: the unit of the depth files doesn't fit"
    )
  return total / count
