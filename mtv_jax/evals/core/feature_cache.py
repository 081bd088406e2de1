"""Cache of image features, in memory and in a folder.

FOLDER/KEY/START-STOP.NAME.npz   rows START to STOP of a feature

KEY is a hash of what the features depend on: parameters, dtype, preprocessing,
images, versions and device. Files are written as soon as their rows are
encoded, so that a killed process loses at most one span of rows.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float32

import mtv_jax
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core.examples import ImageSet, hash_rows
from mtv_jax.parallel.distributed import any_process
from mtv_jax.utils import atomic
from mtv_jax.utils.text import format_bytes
from mtv_jax.utils.tree import fingerprint

log = logging.getLogger(__name__)

# Bytes of features per encoder in memory: 1.28 M embeddings of ViT-B. Eviction
# depends only on use: all hosts of a pod must evict equal arrays, since they
# recompute them together.
BUDGET = 4 * 2**30

_KEY, _FILE = re.compile(r"[0-9a-f]{16}"), re.compile(r"\d+-\d+\.\w+\.npz")
_ROWS_PER_FILE = 2048  # approximately


@dataclasses.dataclass
class FeatureFolder:
  """Features on disk, at most `limit` bytes; several processes may share it.

  The least recently used files are removed first. Damaged files count as
  missing and are written again.
  """

  path: pathlib.Path
  limit: int
  is_full: bool = False  # The disk is full: nothing more is written.

  def read(
    self, key: str, name: str, span: range
  ) -> Float32[np.ndarray, "n *p d"] | None:
    """Reads the rows `span` of a feature; None if missing or damaged."""
    file = self._file(key, name, span)
    try:
      # The archive has a checksum.
      with np.load(io.BytesIO(file.read_bytes())) as arrays:
        array = arrays["arr_0"]
    except (
      OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
      if not isinstance(error, FileNotFoundError):
        log.warning("%s can't be read (%s): encoding again", file, error)
      return None
    with contextlib.suppress(OSError):  # Another user's file.
      os.utime(file)
    return array

  def write(self, key: str, name: str, span: range, array: np.ndarray) -> None:
    """Writes rows atomically; if the disk is full, warns and stops writing."""
    if self.is_full:
      return
    file, buffer = self._file(key, name, span), io.BytesIO()
    np.savez(buffer, array)
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      atomic.write(file, buffer.getvalue())
    except OSError as error:
      self.is_full = True
      log.warning("%s: %s. Features are not saved.", self.path, error)

  def make_room(self, size: int) -> None:
    """Removes the least recently used files until `size` bytes fit."""
    files = []
    for folder in self.path.glob("*"):
      if _KEY.fullmatch(folder.name) and folder.is_dir():
        atomic.remove_abandoned(folder)
        for file in filter(lambda f: _FILE.fullmatch(f.name), folder.iterdir()):
          with contextlib.suppress(FileNotFoundError):
            files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    total = size + sum(file_size for _, file_size, _ in files)
    for _, file_size, file in sorted(files):
      if total <= self.limit:
        break
      with contextlib.suppress(OSError):  # Another user's file.
        file.unlink(missing_ok=True)
        total -= file_size

  def _file(self, key: str, name: str, span: range) -> pathlib.Path:
    return self.path / key / f"{span.start}-{span.stop}.{name}.npz"


# Digest and preprocessing of a set of images, and a feature's name.
View = tuple[str, Preprocess | None]
_Key = tuple[str, Preprocess | None, str]


class FeatureCache:
  """Features of an encoder, by view of a set of images and name.

  `needs` are the names that evaluations will request for a view: the first
  request computes all of them.
  """

  def __init__(self):
    self.folder: FeatureFolder | None = None
    self.needs: dict[View, set[str]] = {}
    self._arrays: collections.OrderedDict[_Key, np.ndarray] = (
      collections.OrderedDict()
    )
    self._digest, self._keys = "", {}
    self._has_warned = False

  def get(self, view: View, name: str) -> np.ndarray | None:
    """Returns an array, if in memory."""
    if (key := (*view, name)) in self._arrays:
      self._arrays.move_to_end(key)
    return self._arrays.get(key)

  def put(self, view: View, name: str, array: np.ndarray) -> None:
    """Keeps a read-only array in memory and evicts the least recently used."""
    array.setflags(write=False)
    self._arrays[key := (*view, name)] = array
    # An array larger than the budget evicts only itself.
    self._arrays.move_to_end(key, last=array.nbytes <= BUDGET)
    while sum(a.nbytes for a in self._arrays.values()) > BUDGET:
      evicted_key, array = self._arrays.popitem(last=False)
      if not self._has_warned and self.folder is None:
        log.warning(
          "features of an encoder exceed the cache of %.2g GB: %s %s of the "
          "data %s is the first to be evicted and will be computed again",
          BUDGET / 1e9, evicted_key[2], array.shape, evicted_key[0],
        )  # fmt: skip
      self._has_warned = True

  def open_folder(self, size: int) -> FeatureFolder | None:
    """Returns the folder if `size` bytes of features fit. Collective."""
    if self.folder is None or any_process(self.folder.is_full):
      return None
    if size <= self.folder.limit:
      return self.folder
    log.warning(
      "%s of features exceed the limit of %s for %s and are not saved; raise "
      "--features_gb", format_bytes(size), format_bytes(self.folder.limit),
      self.folder.path,
    )  # fmt: skip
    return None

  def key(self, encoder: Encoder, data: ImageSet) -> str:
    """Folder name of the features of images; depends on their content."""
    preprocess = getattr(encoder, "preprocess", None)
    if (view := (data.digest, preprocess)) not in self._keys:
      self._digest = self._digest or fingerprint(encoder.params["image"])
      device = encoder.mesh.devices.flat[0]
      self._keys[view] = hash_rows([
        (self._digest, type(encoder).__name__, encoder.spec.image),
        (encoder.dtype, preprocess and json.dumps(preprocess.to_dict())),
        (data.content, mtv_jax.__version__, jax.__version__),
        (device.platform, device.device_kind),
      ])  # fmt: skip
    return self._keys[view]


def spans(
  count: int, batch_size: int, *, max_rows: int | None = None
) -> Iterator[range]:
  """Yields each file's rows of a feature: whole batches, except in the last."""
  rows = max(1, min(_ROWS_PER_FILE, max_rows or _ROWS_PER_FILE))
  rows = -(-rows // batch_size) * batch_size
  starts: Sequence[int] = range(0, max(1, count // rows) * rows, rows)
  for start in starts:
    yield range(start, count if start == starts[-1] else start + rows)
