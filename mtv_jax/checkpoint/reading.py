"""Reads and verifies a checkpoint, or a part of it, without a run.

A checkpoint is one folder per step, committed by a rename:

  checkpoints/STEP/state      arrays of the train state, as nested dictionaries
                              by name, independent of the state's classes
  checkpoints/STEP/timing     the run's clock, as JSON
  checkpoints/STEP/checksums  checksums of the arrays and the clock, as JSON
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mtv_jax.checkpoint import checksums
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  StorageError,
  UserError,
)
from mtv_jax.utils.text import first_lines
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

Path = str | epath.PathLike
_VERSION = 1  # Format version of the checksums.
_CHECKSUMS_KEY = "checksums"  # Key of the version in the timing.

# TensorStore statuses and system errors if the storage does not answer.
_STATUSES = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED)\b"
)
_ERRNOS = {
  errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH,
  errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip


class DamagedCheckpointError(InputError):
  """Raised if files of a checkpoint are missing, unreadable or changed."""


class _ChecksumError(Exception):
  """Raised when something differs from the stored checksums."""


def saved_steps(folder: Path) -> list[int]:
  """Steps of a run's complete checkpoints, from folder names only."""
  return list_steps(to_absolute(folder) / "checkpoints")


def to_absolute(folder: Path) -> epath.Path:
  """Returns an absolute path or a URL, as Orbax requires."""
  path = epath.Path(path_lib.as_path(folder))
  # `Path.absolute` would turn a URL into a local path.
  return path if path_lib.is_remote(path) else path.absolute()


def list_steps(folder: epath.Path) -> list[int]:
  """Steps of the complete checkpoints in a `checkpoints` folder."""
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def load_tree(
  folder: Path, *, step: int | None = None, part: str = "params"
) -> Any:
  """Reads and verifies one part of a checkpoint as numpy arrays.

  Works on any machine. Read-only, so it is safe during training.

  Args:
    folder: a run's folder or its `checkpoints` folder.
    step: the latest by default.
    part: any branch of the state: 'params', 'teacher', 'ema', 'params/image'.

  Returns:
    Nested dictionaries of numpy arrays (or one array, if the part is a leaf).

  Raises:
    MissingFileError: the checkpoint does not exist.
    DamagedCheckpointError: files are missing, truncated or changed.
    StorageError: the storage does not answer.
    InputError: the checkpoint lacks the part; lists its parts.
  """
  checkpoint, stored, metadata = find_part(folder, step=step, part=part)
  folder, item = checkpoint.parent, checkpoint / "state"
  with report_damage(folder, int(checkpoint.name), list_steps(folder)):
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    arrays = read_arrays(item, metadata, dict.fromkeys(metadata, as_numpy))
    verify_arrays(arrays, stored)
  tree = unflatten_names(arrays)
  for name in part.split("/"):
    tree = tree[name]
  return tree


def find_part(
  folder: Path, *, step: int | None = None, part: str = "params"
) -> tuple[epath.Path, dict[str, str], dict[str, Any]]:
  """Finds a part of a checkpoint, without its arrays; see `load_tree`.

  Returns the checkpoint's folder, its `read_checksums`, and shapes and dtypes
  of the part by name.
  """
  folder = to_absolute(folder)
  if (folder / "checkpoints").exists():
    folder = folder / "checkpoints"
  if not folder.exists():
    raise MissingFileError(f"{folder} does not exist.")
  if not (steps := list_steps(folder)):
    raise MissingFileError(f"no complete checkpoint in {folder}.")
  step = max(steps) if step is None else step
  require_step(folder, step, steps)
  checkpoint = folder / str(step)
  with report_damage(folder, step, steps):
    stored = read_checksums(checkpoint)
    saved = read_index(checkpoint / "state", stored)
  found = {n: m for n, m in saved.items() if f"{n}/".startswith(f"{part}/")}
  if not found:
    parts = ", ".join(sorted({name.split("/")[0] for name in saved}))
    item = checkpoint / "state"
    raise InputError(f"{item} has no {part!r}. Its parts are: {parts}.")
  return checkpoint, stored, found


def read_index(item: epath.Path, stored: Mapping[str, str]) -> dict[str, Any]:
  """Shape and dtype of a checkpoint's arrays by name."""
  # List the index first. If it is corrupt, Orbax raises from one of many
  # concurrent reads, and the rest fail in a closed event loop.
  base = str(item) if "://" in str(item) else f"file://{item}"
  store = {"driver": "ocdbt", "base": f"{base}/"}
  ts.KvStore.open(store).result().list().result()
  metadata = ocp.PyTreeCheckpointHandler().metadata(item).tree
  saved = dict(flatten_with_names(metadata))
  # Detects an array missing from the index, which a part would silently lack.
  expected = {name: text.split()[0] for name, text in stored.items()}
  actual = {name: checksums.describe(x) for name, x in saved.items()}
  _require_equal(actual, expected, "names or shapes")
  return saved


def read_arrays(
  item: epath.Path,
  wanted: Mapping[str, Any],
  restore_args: Mapping[str, ocp.RestoreArgs],
) -> dict[str, Any]:
  """Reads the wanted arrays of a checkpoint's state, by name.

  The bare handler runs without barriers, so a single process may call it.
  """
  silence_orbax_tracebacks()
  shapes = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in wanted.items()
  }
  args = ocp.args.PyTreeRestore(
    unflatten_names(shapes),
    restore_args=unflatten_names(restore_args),
    partial_restore=True,
  )
  restored = ocp.PyTreeCheckpointHandler().restore(item, args=args)
  arrays = dict(flatten_with_names(restored))
  return {name: arrays[name] for name in wanted}


@functools.cache
def silence_orbax_tracebacks() -> None:
  """Suppresses repeated tracebacks of a failure that is raised once here.

  After one of Orbax's concurrent reads or writes has raised, the rest fail in a
  closed event loop, as unresumed coroutines or as abandoned tasks, each with a
  traceback.
  """
  silenced = (
    "Event loop is closed",
    "Encountered error while reading array index",
    "_GatheringFuture exception was never retrieved",
  )

  def should_log(record: logging.LogRecord) -> bool:
    files = [record.pathname]
    if record.exc_info:  # asyncio logs the errors of abandoned tasks.
      trace = traceback.walk_tb(record.exc_info[2])
      files += [frame.f_code.co_filename for frame, _ in trace]
    is_orbax = any("/orbax/" in file for file in files)
    is_traceback = bool(record.exc_info) and is_orbax
    return not (is_traceback or record.getMessage().startswith(silenced))

  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(should_log)
  print_exception = sys.unraisablehook

  def print_unless_silenced(unraisable: Any) -> None:
    if not str(unraisable.exc_value).startswith(silenced):
      print_exception(unraisable)

  sys.unraisablehook = print_unless_silenced


def restore_json_item(item: epath.Path) -> Any:
  """Reads a JSON item of a checkpoint."""
  return ocp.JsonCheckpointHandler().restore(item, args=ocp.args.JsonRestore())


def make_json_items(
  arrays: checksums.Flat, timing: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """The items `timing` and `checksums`; every process must call it."""
  timing = {**timing, _CHECKSUMS_KEY: _VERSION}
  sums = {"arrays": checksums.describe_arrays(arrays), "timing": _hash(timing)}
  return {"timing": timing, "checksums": {"version": _VERSION, **sums}}


def read_checksums(checkpoint: epath.Path) -> dict[str, str]:
  """Dtype, shape and checksum of a checkpoint's arrays by name."""
  if not (checkpoint / "checksums").exists():
    raise _ChecksumError("its checksums are missing")
  stored = restore_json_item(checkpoint / "checksums")
  if stored["version"] != _VERSION:
    raise _ChecksumError(f"its checksums have version {stored['version']!r}")
  return dict(stored["arrays"])


def read_timing(checkpoint: epath.Path) -> dict[str, Any]:
  """The clock of a checkpoint, verified."""
  timing = restore_json_item(checkpoint / "timing")
  stored = restore_json_item(checkpoint / "checksums")["timing"]
  _require_equal({"timing": _hash(timing)}, {"timing": stored}, "checksums")
  timing.pop(_CHECKSUMS_KEY, None)
  return timing


def verify_arrays(arrays: checksums.Flat, stored: Mapping[str, str]) -> None:
  """Verifies arrays against `stored`; every process must call it."""
  actual = checksums.describe_arrays(arrays)
  _require_equal(actual, {name: stored[name] for name in arrays}, "checksums")


def _hash(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _require_equal(
  actual: Mapping[str, str], stored: Mapping[str, str], what: str
) -> None:
  names = sorted({*actual, *stored})
  differing = [name for name in names if actual.get(name) != stored.get(name)]
  if differing:
    raise _ChecksumError(
      f"the {what} of {len(differing)} of {len(names)} arrays differ from the "
      f"stored ones:\n{first_lines(differing, 5)}"
    )


def require_step(folder: epath.Path, step: int, steps: Sequence[int]) -> None:
  """Raises MissingFileError unless the step is in `steps`."""
  if step not in steps:
    hint = f"Its steps are: {', '.join(map(str, sorted(steps))) or 'none'}."
    raise MissingFileError(f"no checkpoint of step {step} in {folder}. {hint}")


@contextlib.contextmanager
def report_damage(
  folder: epath.Path, step: int, steps: Sequence[int]
) -> Iterator[None]:
  """Turns the exceptions that damaged files cause into DamagedCheckpointError.

  Few libraries expect corrupt files, so almost any exception counts, except a
  lack of permission or memory. StorageError: the storage does not answer.
  """
  try:
    yield
  except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    path = folder / str(step)
    cause = f"{type(error).__name__}: {str(error)[:300]}"
    if _is_storage_error(error):
      raise StorageError(
        f"{path} can't be read ({cause}). Try again when its storage answers."
      ) from error
    advice = "There is no earlier one."
    if earlier := [s for s in steps if s < step]:
      option = "Training with --restore=latest_good can resume from step"
      advice = f"{option} {max(earlier)}, the checkpoint before it."
    is_sum = isinstance(error, _ChecksumError)
    cause = error if is_sum else f"its files are missing or corrupt ({cause})"
    raise DamagedCheckpointError(
      f"{path} is damaged: {cause}.\n{advice}"
    ) from error


def _is_storage_error(error: Exception) -> bool:
  if isinstance(error, ConnectionError | TimeoutError):
    return True
  error_number = error.errno if isinstance(error, OSError) else None
  return error_number in _ERRNOS or bool(_STATUSES.search(str(error)))
