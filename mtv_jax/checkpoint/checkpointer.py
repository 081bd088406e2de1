"""Orbax checkpoints of the train state: save, restore, and read a part.

A checkpoint is one folder per step, committed by a rename:

  checkpoints/STEP/state    the train state's arrays, as nested dictionaries of
                            names: independent of the state's classes
  checkpoints/STEP/timing   the clock of the run, as JSON

Uses `orbax.checkpoint`'s v0 interface; v1 is still experimental.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mtv_jax.checkpoint.partial_restore import (
  CheckpointMismatchError,
  first_lines,
)
from mtv_jax.utils.errors import InputError, MissingFileError, UserError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

Path = str | epath.PathLike


class DamagedCheckpointError(InputError):
  """A checkpoint with missing or unreadable files."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A train state on the current mesh, its step and the run's clock."""

  state: Any
  timing: dict[str, Any]
  step: int


class Checkpointer:
  """Saves and restores the whole train state of a run.

  Every process calls every method, in the same order. As a context manager it
  waits on exit for the save in progress, which an exiting interpreter would
  abort.

  Args:
    folder: the run's `checkpoints` folder, created if missing. Unfinished
      checkpoints of a killed run are never read, and on file systems deleted.
    every_steps: `due(step)` is true on its multiples.
    keep: number of latest checkpoints that are not deleted.
    keep_every: nor are those at multiples of this many steps; None or 0 for
      none.
  """

  def __init__(
    self,
    folder: Path,
    *,
    every_steps: int,
    keep: int = 2,
    keep_every: int | None = None,
  ):
    self.folder = epath.Path(folder).absolute()
    self.every_steps = every_steps
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        # Object stores lack renames: a checkpoint without Orbax's commit file
        # counts as unfinished there, also one that was copied.
        cleanup_tmp_directories="://" not in str(self.folder),
        save_root_metadata=False,  # Only steps in the folder.
      ),
    )

  def due(self, step: int) -> bool:
    """Whether `step` is a multiple of `every_steps`."""
    return step % self.every_steps == 0

  def preempted(self, step: int) -> bool:
    """Whether to save and exit now, after SIGTERM to one of several processes.

    Every process calls it after every step: they agree on a step that none has
    passed yet, and it is true on that step only.
    """
    return self._manager.reached_preemption(step)

  def save(
    self, step: int, state: Any, *, timing: Mapping[str, Any] | None = None
  ) -> None:
    """Starts saving, and returns once the arrays may be donated.

    Writes in the background. Raises the error of an earlier save that failed.
    Saving an existing step does nothing.

    Args:
      step: the number of updates done.
      state: a tree of arrays.
      timing: JSON-able; restored with the state.
    """
    if not self.saving:
      self.wait()
    if step in self._manager.all_steps():
      return
    flat = _flat(state)
    for name, leaf in flat.items():
      if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(f"state/{name} is {leaf!r}, expected an array.")
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(unflatten_names(flat)),
        timing=ocp.args.JsonSave(dict(timing or {})),
      ),
      force=True,  # The caller decides when to save.
    )

  @property
  def saving(self) -> bool:
    """Whether a save is in progress."""
    return self._manager.is_saving_in_progress()

  def wait(self) -> None:
    """Waits for the save in progress and raises its error, if any."""
    self._manager.wait_until_finished()

  def steps(self) -> list[int]:
    """All complete checkpoints; waits for a save in progress."""
    self.wait()
    return sorted(self._manager.all_steps())

  def restore(
    self, abstract_state: Any, *, step: int | None = None
  ) -> Restored | None:
    """Restores a checkpoint into the current mesh, even from another mesh.

    Args:
      abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings (or of
        arrays). Leaves without a sharding go to the default device.
      step: the latest by default.

    Returns:
      None if the run has no checkpoint and no step is given.

    Raises:
      MissingFileError: no such step.
      CheckpointMismatchError: names, shapes or types differ; lists them.
      DamagedCheckpointError: files of it are missing or truncated.
    """
    steps = self.steps()
    if step is None and not steps:
      return None
    step = steps[-1] if step is None else step
    _require_step(self.folder, step, steps)
    flat = _flat(abstract_state)
    restore_args = {name: _restore_args(leaf) for name, leaf in flat.items()}
    with _reading(self.folder, step, steps):
      saved = _saved(self.folder / str(step) / "state")
      _require_same(saved, flat, f"{self.folder}/{step}")
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            unflatten_names(flat), restore_args=unflatten_names(restore_args)
          ),
          timing=ocp.args.JsonRestore(),
        ),
      )
    arrays = _flat(restored["state"])
    state = jax.tree.unflatten(
      jax.tree.structure(abstract_state), [arrays[name] for name in flat]
    )
    return Restored(state, restored["timing"], step)

  def close(self) -> None:
    """Waits for the save in progress, raises its error, frees the threads."""
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()


def _flat(tree: Any) -> dict[str, Any]:
  return dict(flatten_with_names(tree))


def _restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    # Otherwise Orbax would use the devices of the saved shardings, which this
    # machine may lack.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(
    sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype
  )


def _saved(item: epath.Path) -> dict[str, Any]:
  """Shape and dtype of a checkpoint's arrays by name."""
  # Where the index is corrupt, Orbax would raise from one of many concurrent
  # reads, and the others would fail in a closed event loop.
  base = str(item) if "://" in str(item) else f"file://{item}"
  store = {"driver": "ocdbt", "base": f"{base}/"}
  ts.KvStore.open(store).result().list().result()
  return _flat(ocp.PyTreeCheckpointHandler().metadata(item).tree)


def _require_step(folder: epath.Path, step: int, steps: Sequence[int]) -> None:
  if step not in steps:
    raise MissingFileError(
      f"no checkpoint of step {step} in {folder}. Its steps are:"
      f" {', '.join(map(str, sorted(steps))) or 'none'}."
    )


@contextlib.contextmanager
def _reading(
  folder: epath.Path, step: int, steps: Sequence[int]
) -> Iterator[None]:
  """Raises DamagedCheckpointError for the libraries' read errors."""
  try:
    yield
  except UserError:
    raise
  except (ValueError, OSError, LookupError) as error:
    earlier = [s for s in steps if s < step]
    instead = "There is no earlier one."
    if earlier:
      instead = f"Move it away to resume from step {max(earlier)}."
    raise DamagedCheckpointError(
      f"{folder}/{step} can't be read: files in it are missing or corrupt."
      f" {instead} Cause: {type(error).__name__}: {str(error)[:300]}"
    ) from error


def _require_same(
  saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str
) -> None:
  """Raises with a diff of names, shapes and types if the trees differ."""
  lines = []
  for name in sorted({*saved, *wanted}):
    old, new = (
      f"{np.dtype(t[name].dtype).name}[{','.join(map(str, t[name].shape))}]"
      if name in t
      else ""
      for t in (saved, wanted)
    )
    if old != new:
      lines += [f"- {name}  {old}"] if old else []
      lines += [f"+ {name}  {new}"] if new else []
  if lines:
    raise CheckpointMismatchError(
      f"{path} is a checkpoint of another shape than this config's state"
      " (- in the checkpoint, + in this run):\n"
      f"{first_lines(lines, 20)}\n"
      "Resume with the config that started the run (its config.json), or load"
      " what fits into a new run through config.init."
    )


# ---------------------------------------------------------------------------
# Reading a part, for evaluation, export and initialisation.


def saved_steps(folder: Path) -> list[int]:
  """Steps of the complete checkpoints of a run, of its folder's names alone."""
  folder = epath.Path(folder).absolute() / "checkpoints"
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def load_tree(
  folder: Path, *, step: int | None = None, part: str = "params"
) -> Any:
  """Reads one part of a checkpoint as numpy arrays, on any machine.

  Writes nothing, so that it may be called during training.

  Args:
    folder: a run's folder or its `checkpoints` folder.
    step: the latest by default.
    part: 'params', 'teacher', 'ema', 'params/image' or any other branch of
      the state.

  Returns:
    Nested dictionaries of numpy arrays (or one array, if the part is one).

  Raises:
    MissingFileError: no such checkpoint.
    DamagedCheckpointError: files of it are missing or truncated.
    InputError: the checkpoint lacks the part; names its parts.
  """
  folder = epath.Path(folder).absolute()
  if (folder / "checkpoints").exists():
    folder = folder / "checkpoints"
  if not folder.exists():
    raise MissingFileError(f"{folder} does not exist.")
  steps = ocp.utils.checkpoint_steps(folder)
  if not steps:
    raise MissingFileError(f"no complete checkpoint in {folder}.")
  step = max(steps) if step is None else step
  _require_step(folder, step, steps)
  item = folder / str(step) / "state"
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  with _reading(folder, step, steps):
    saved = _saved(item)
    flat = {n: m for n, m in saved.items() if f"{n}/".startswith(f"{part}/")}
    if not flat:
      raise InputError(
        f"{item} has no {part!r}. Its parts are:"
        f" {', '.join(sorted({name.split('/')[0] for name in saved}))}."
      )
    # The bare handler has no barriers: one process of many may read alone.
    restored = ocp.PyTreeCheckpointHandler().restore(
      item,
      args=ocp.args.PyTreeRestore(
        unflatten_names(
          {n: jax.ShapeDtypeStruct(m.shape, m.dtype) for n, m in flat.items()}
        ),
        restore_args=unflatten_names(dict.fromkeys(flat, as_numpy)),
        partial_restore=True,
      ),
    )
  for name in part.split("/"):
    restored = restored[name]
  return restored
