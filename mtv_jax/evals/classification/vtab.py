"""VTAB (Zhai et al. 2019): 19 classification tasks under one name.

`data` is a folder with, for each task, one of

  caltech101/, vtab/caltech101/, wds_vtab-caltech101/, ...
                  CLIP_benchmark's tars, or a folder of splits
  cifar100/3.0.2/ a TFDS data set, with VTAB's splits; not for the seven
                  tasks whose labels are computed from annotations

VTAB-1k trains on 1,000 images: VTAB's train800val200 of a TFDS set, or evenly
spaced images of a folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from mtv_jax.config.options import PositiveInt
from mtv_jax.data import registry as sources
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import base, global_features
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.examples import Data, Splits
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.files import unknown_layout
from mtv_jax.evals.datasets.scenes import is_scenes
from mtv_jax.utils.errors import check_choice
from mtv_jax.utils.text import list_first


class _Task(NamedTuple):
  """A task; its TFDS name is "" if VTAB computes the label."""

  group: str
  tfds: str = ""
  # Percent of `train` after which the validation images start, for sets without
  # a validation split; sets without a test split are tested on the last fifth.
  percent: int | None = None
  has_test: bool = True


_N, _S, _D = "natural", "specialized", "structured"
TASKS = {
  "caltech101": _Task(_N, "caltech101", 90),
  "cifar100": _Task(_N, "cifar100", 90),
  "dtd": _Task(_N, "dtd"),
  "flowers": _Task(_N, "oxford_flowers102"),
  "pets": _Task(_N, "oxford_iiit_pet", 80),
  "sun397": _Task(_N, "sun397/tfds"),
  "svhn": _Task(_N, "svhn_cropped", 90),
  "pcam": _Task(_S, "patch_camelyon"),
  "eurosat": _Task(_S, "eurosat/rgb", 60, has_test=False),
  "resisc45": _Task(_S, "resisc45", 60, has_test=False),
  "diabetic_retinopathy": _Task(
    _S, "diabetic_retinopathy_detection/btgraham-300"
  ),
  "clevr_count_all": _Task(_D),
  "clevr_closest_object_distance": _Task(_D),
  "dmlab": _Task(_D, "dmlab"),
  "kitti_closest_vehicle_distance": _Task(_D),
  "dsprites_label_x_position": _Task(_D),
  "dsprites_label_orientation": _Task(_D),
  "smallnorb_label_azimuth": _Task(_D),
  "smallnorb_label_elevation": _Task(_D),
}
# A task's folder, as CLIP_benchmark and its data on the hub name it.
_FOLDERS = ("{}", "vtab/{}", "vtab-{}", "wds_vtab-{}", "wds_{}")


@dataclasses.dataclass(frozen=True)
class Vtab(Evaluator):
  """Top-1 of each task, its mean over all tasks and over each group.

  Attributes:
    data: see the module docstring.
    tasks: names in `TASKS`; all by default. A mean over fewer tasks is
      not a VTAB score.
    train_count: training images per task; None for all ("full").
    count: test images per task, evenly spaced; all by default.
    head: evaluator for tasks, with its defaults; `logistic` and `linear_probe`
      select their hyper-parameter on a part of the training images.
    view: see `global_features.with_view`; VTAB's by default.
  """

  data: Data = "scenes"
  tasks: tuple[str, ...] | None = None
  train_count: PositiveInt | None = 1000
  count: PositiveInt | None = None
  head: Literal["logistic", "linear_probe", "finetune"] = "logistic"
  view: global_features.ViewName = "squash"
  batch_size: PositiveInt = 64

  title = "VTAB"

  def __post_init__(self):
    super().__post_init__()
    for name in self.tasks or ():
      check_choice("vtab.tasks", name, TASKS)

  @functools.cached_property
  def _set(self) -> dict[str, Splits]:
    names, data = self.tasks or [*TASKS], self.data
    expected = "VTAB reads a folder that has a subfolder per task."
    if isinstance(data, Mapping) or is_scenes(data):
      raise NotApplicable(f"data={data!r}: {expected}")
    if not (root := pathlib.Path(data)).is_dir():
      raise unknown_layout(data, expected)
    config_by_task = {name: self._find_task(root, name) for name in names}
    if missing := [
      name for name, config in config_by_task.items() if config is None
    ]:
      others = json.dumps(
        [name for name in config_by_task if name not in missing]
      )
      fix = f"To evaluate the others: --set='vtab.tasks={others}'"
      raise NotApplicable(
        f"{root} lacks {len(missing)} of {len(config_by_task)} tasks: "
        f"{list_first(missing, 19)}. {expected if others == '[]' else fix}"
      )
    return {
      name: registry.open_splits(**config, count=self.count)
      for name, config in config_by_task.items()
    }

  def _find_task(self, root: pathlib.Path, name: str) -> dict[str, Any] | None:
    """Arguments of `open_splits` for a task; None if the folder lacks it."""
    tfds_name, _, config = TASKS[name].tfds.partition("/")
    pattern = f"{config}/*/dataset_info.json".lstrip("/")
    if tfds_name and any((root / tfds_name).glob(pattern)):
      return self._list_splits(root, TASKS[name])
    folders = [root / pattern.format(name) for pattern in _FOLDERS]
    folder = next((f for f in folders if f.is_dir()), None)
    return folder and {"data": folder, "train_count": self.train_count}

  def _list_splits(self, root: pathlib.Path, task: _Task) -> dict[str, Any]:
    config = {"type": "tfds", "name": task.tfds, "data_dir": str(root)}
    train, test, start, source = "train+validation", "test", 0, "validation"
    if task.percent is not None:
      num_images = len(sources.build_source(config | {"split": "train"}))
      train, start, source = "train", num_images * task.percent // 100, "train"
      if not task.has_test:
        num_train = num_images * 80 // 100
        train, test = f"train[:{num_train}]", f"train[{num_train}:]"
    if (count := self.train_count) is not None:
      num_val = count // 5
      train = f"train[:{count - num_val}]+{source}[{start}:{start + num_val}]"
    return {
      "data": config | {"split": test},
      "train": config | {"split": train},
    }

  def run(self, encoder: Encoder) -> Result:
    """Evaluates all tasks."""
    options = {"data": self.data, "view": self.view}
    if self.head != "finetune":
      options["select"] = "train_split"
    options["batch_size"] = self.batch_size
    head = base.build_evaluator(self.head, options)
    results = {k: head.run_on(encoder, data) for k, data in self._set.items()}
    tasks_by_group = {"mean": [*results]}
    for name in results:
      tasks_by_group.setdefault(TASKS[name].group, []).append(name)
    tasks_by_group |= {name: [name] for name in results}

    def average(field: str, mean: Callable = np.mean) -> dict[str, Any]:
      """Averages `top1` of a result field over each group of tasks."""
      values = {k: getattr(r, field)["top1"] for k, r in results.items()}
      return {
        name: mean([values[task] for task in tasks], axis=0)
        for name, tasks in tasks_by_group.items()
      }

    protocol = encoder.protocol()
    tasks = {
      name: {k: v for k, v in r.protocol.items() if protocol.get(k) != v}
      for name, r in results.items()
    }
    return Result(
      average("metrics"),
      {**protocol, "head": self.head, "tasks": tasks},
      average("chance"),
      # Test sets are independent, so their variances add.
      errors=average("errors", lambda x, axis: np.linalg.norm(x) / len(x)),
      resamples=average("resamples"),
    )
