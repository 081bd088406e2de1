"""Expert protocol, and the depth expert for any model of inverse depth."""

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from mtv_jax.config.options import build
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.experts import local_mesh
from mtv_jax.utils.errors import InputError, did_you_mean

Image = UInt8[np.ndarray, "h w 3"]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PreparedInput:
  """An expert's input for one record."""

  group: Hashable  # A group's records have equal shapes and share batches.
  arrays: Mapping[str, np.ndarray]  # For `run`, without a batch dimension.
  meta: Any = None  # For `finish`.


@runtime_checkable
class Expert(Protocol):
  """A model that labels images in batches.

  `prepare` and `finish` run on the host in several threads. `run` is called
  from one thread and returns before the devices are done, to overlap host and
  device work.
  """

  kind: str  # Kind of labels, one of `label_values.KINDS`.
  # Everything that determines the labels (JSON), for the manifest: model, hash
  # of the weights, sizes, thresholds.
  settings: Mapping[str, Any]
  rows: int  # Batch size of `run`, over all devices of this host.

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses a decoded image.

    Args:
      image: image of any size, with EXIF rotation applied.
      record: key, captions (possibly empty) and `meta`, its .json fields.

    Raises:
      BadRecord: the record cannot be labelled; counted with the reason.
    """
    ...

  def run(self, arrays: Arrays) -> Mapping[str, jax.Array | np.ndarray]:
    """Starts the model on stacked arrays `[rows, ...]` of one group.

    Returns arrays `[rows, ...]`; experts that run on the host return NumPy.
    """
    ...

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """Converts one record's row of `run`'s arrays to its label."""
    ...


# `MODULE:NAME`, an object of a user's module.
PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def import_plugin(name: str, option: str) -> Any:
  """Imports the object `MODULE:NAME` that an option names."""
  path, _, attribute = name.partition(":")
  try:
    module = importlib.import_module(path)
  except ModuleNotFoundError as error:
    raise InputError(
      f"{option}={name!r}: {error}. Add the module's folder to PYTHONPATH."
    ) from error
  if not hasattr(module, attribute):
    public = [key for key in vars(module) if not key.startswith("_")]
    raise InputError(
      f"{option}={name!r}: {path} lacks {attribute!r}."
      f" {did_you_mean(attribute, public)}"
    )
  return getattr(module, attribute)


def check_options(load: Callable[..., Expert]) -> Callable[..., Expert]:
  """Decorates `load_expert` to check options against its annotations."""
  name = load.__module__.removeprefix("mtv_jax.experts.")

  @functools.wraps(load, updated=())
  def checked_load(path: str | os.PathLike, **options: Any) -> Expert:
    return build(functools.partial(load, path), options, where=name)

  return checked_load


class DepthExpert:
  """Labels images with the inverse depth of a model.

  `function` maps `params` and `images` `[n, h, w, 3]` to inverse `depth`
  `[n, h, w]`, with an arbitrary scale per image. `preprocess` maps an image to
  the model's input; inputs of equal shape share a batch. Labels are `side` x
  `side` pixels of `bits`; `batch_size` is images per device.
  """

  kind = "depth"

  def __init__(
    self,
    function: Callable[[PyTree, PyTree], dict[str, jax.Array]],
    params: PyTree,
    preprocess: Callable[[np.ndarray], np.ndarray],
    *,
    mesh: Mesh,
    batch_size: int,
    side: int,
    bits: int,
    settings: Mapping[str, Any],
  ):
    self.rows = batch_size * mesh.size
    self._size = {"side": side, "bits": bits}
    self.settings = {
      **settings,
      "batch_size": batch_size,
      **label_values.depth_settings(self._size),
    }
    self._mesh, self._preprocess = mesh, preprocess
    self._params = local_mesh.replicate(params, mesh)
    self._function = local_mesh.jit_per_device(function, mesh)

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses an image."""
    del record
    pixels = self._preprocess(image)
    return PreparedInput(pixels.shape[:2], {"images": pixels})

  def run(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Predicts inverse `depth` `[rows, h, w]`."""
    return self._function(self._params, local_mesh.shard(arrays, self._mesh))

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """The label of one image: its depth map, averaged to the label size."""
    del meta
    return label_values.make_depth(outputs["depth"], **self._size)
