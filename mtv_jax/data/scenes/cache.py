"""Memory-mapped cache of rendered records, shared by processes.

A folder with one array file per field and `manifest.json`, which is written
last and stores the settings of the records. Texts are UTF-8, joined by line
feeds within a record. For fields of varying length, `NAME_ends.npy` stores
where each record ends.
"""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import filelock
import numpy as np

from mtv_jax.data.records import Record
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.threads import map_ahead

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_FIXED = ("image", "depth", "segmentation", "label")  # Equal shapes.
_BOXES = ("boxes", "box_scores")
_TEXTS = ("captions", "phrases")

Arrays = dict[str, np.ndarray]


def open_cache(
  folder: pathlib.Path,
  settings: Mapping[str, Any],
  render: Callable[[int], Record],
  length: int,
) -> Arrays:
  """Returns the memory-mapped arrays of a folder; renders them if missing.

  One process renders, with a thread per core, while the rest wait. `settings`
  (JSON) is everything that the records depend on. Raises ConfigError if the
  folder's settings differ.
  """
  settings = json.loads(json.dumps(settings))  # Tuples become lists.
  if not _is_complete(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
      # If the file system lacks locks, several processes render equal files.
      with contextlib.suppress(NotImplementedError, OSError):
        stack.enter_context(lock)
      if not _is_complete(folder, settings):
        atomic.remove_abandoned(folder)
        _write(folder, settings, render, length)
  names = json.loads((folder / MANIFEST).read_bytes())["arrays"]
  mapped = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in names}
  # Plain array views: slicing a `memmap` is slow.
  return {name: np.asarray(array) for name, array in mapped.items()}


def read_record(arrays: Arrays, i: int) -> Record:
  """Returns record i, without its key; arrays are views of the files."""
  record: Record = {name: arrays[name][i] for name in _FIXED}
  record["label"] = int(record["label"])
  for name in (*_BOXES, *_TEXTS):
    ends = arrays["boxes_ends" if name in _BOXES else f"{name}_ends"]
    values = arrays[name][ends[i - 1] if i else 0 : ends[i]]
    if name in _TEXTS:
      values = values.tobytes().decode().split("\n") if len(values) else []
    record[name] = values
  return record


def _is_complete(folder: pathlib.Path, settings: Mapping[str, Any]) -> bool:
  """Whether the folder is complete; ConfigError if its settings differ."""
  try:
    manifest = json.loads((folder / MANIFEST).read_bytes())
  except FileNotFoundError:
    return False
  except ValueError:
    manifest = {}
  expected = {"format": _FORMAT, "settings": dict(settings)}
  if {k: manifest.get(k) for k in expected} != expected:
    raise ConfigError(
      f"cache={folder} has records of {manifest.get('settings')}, expected"
      f" {dict(settings)}. Give another folder, or remove this one."
    )
  return True


def _write(
  folder: pathlib.Path,
  settings: Mapping[str, Any],
  render: Callable[[int], Record],
  length: int,
) -> None:
  """Renders all records and writes the files, manifest last."""
  log.info("Rendering %d scenes to %s, once.", length, folder)
  start = time.perf_counter()
  first = render(0)
  parts = {name: [] for name in (*_BOXES, *_TEXTS)}
  arrays = {}
  with contextlib.ExitStack() as stack:
    for name in _FIXED:
      value = np.asarray(first[name])
      path = folder / f"{name}.npy"
      temporary = stack.enter_context(atomic.replace_file(path))
      shape = (length, *value.shape)
      arrays[name] = np.lib.format.open_memmap(
        temporary, "w+", value.dtype, shape
      )
    for i, record in enumerate(map_ahead(render, range(length))):
      for name in _FIXED:
        arrays[name][i] = record[name]
      for name in _BOXES:
        parts[name].append(record[name])
      for name in _TEXTS:
        text = "\n".join(record[name]).encode()
        parts[name].append(np.frombuffer(text, np.uint8))
    for array in arrays.values():
      array.flush()
  for name, values in parts.items():
    arrays[name] = np.concatenate(values)
    _save(folder, name, arrays[name])
  for name in ("boxes", *_TEXTS):
    arrays[f"{name}_ends"] = np.cumsum([len(values) for values in parts[name]])
    _save(folder, f"{name}_ends", arrays[f"{name}_ends"])
  manifest = {
    "format": _FORMAT,
    "settings": dict(settings),
    "arrays": {
      name: [str(array.dtype), *array.shape] for name, array in arrays.items()
    },
  }
  atomic.write(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
  log.info("Rendered in %.0f s.", time.perf_counter() - start)


def _save(folder: pathlib.Path, name: str, array: np.ndarray) -> None:
  with (
    atomic.replace_file(folder / f"{name}.npy") as temporary,
    temporary.open("wb") as stream,
  ):
    np.save(stream, array)
