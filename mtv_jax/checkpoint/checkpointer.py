"""Orbax checkpoints of the train state: save, retry, restore.

Uses Orbax's v0 API; v1 is still experimental. `reading.py` describes the files
of a checkpoint.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mtv_jax.checkpoint import barrier, reading
from mtv_jax.checkpoint.partial_restore import require_same
from mtv_jax.checkpoint.reading import DamagedCheckpointError, Path
from mtv_jax.config.durations import Duration, PositiveDuration
from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.parallel.distributed import (
  any_process,
  gather_json,
  name_processes,
)
from mtv_jax.utils.errors import StorageError, UserError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

log = logging.getLogger(__name__)

# Steps between polls of a save by several processes: to agree on its outcome,
# they wait for the devices.
_POLL_STEPS = 10


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """`config.checkpoint`; see `Checkpointer`."""

  every: PositiveDuration = Duration(1000)
  keep: PositiveInt = 2
  keep_every: NonNegativeInt | None = None
  # Number of retries of a failed save before the run ends.
  retries: NonNegativeInt = 5


class CheckpointSaveError(UserError, OSError):
  """Raised when a checkpoint can't be written."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A train state on the current mesh, its step and the run's clock."""

  state: Any
  timing: dict[str, Any]
  step: int


@dataclasses.dataclass
class RetrySchedule:
  """Schedules at most `limit` retries of a failed save.

  The delay doubles from `every_steps / 16` to `every_steps`. A retry saves the
  state of its own, later step.
  """

  every_steps: int
  limit: int
  failures: int = 0  # Since the last complete save.
  due_at: int | None = None  # Step of the next retry.

  @property
  def is_exhausted(self) -> bool:
    """Whether no retry is left."""
    return self.failures > self.limit

  def postpone(self, step: int) -> None:
    """Schedules a retry of the save that failed at `step`."""
    fraction = 2.0 ** min(self.failures - 5, 0)  # 1/16, 1/8, ..., 1
    self.due_at = step + max(1, int(self.every_steps * fraction))


class Checkpointer:
  """Saves and restores the whole train state of a run.

  Every process must call every method in the same order. All use the
  checkpoints that process 0 lists, and agree on the outcome of each restore and
  save:

    idle     `save` starts a save, which is then pending.
    pending  `poll`, called every step, checks whether the save has completed,
             or has failed and needs a retry (`RetrySchedule`). `wait`, `save`,
             `steps` and `__exit__` block until the save ends.

  `poll` raises `CheckpointSaveError` if no retry is left, or at once if the run
  has no checkpoint yet; `wait` raises it for any failure. A failed save deletes
  no complete checkpoint. On exit, the context manager waits for the pending
  save, which an exiting interpreter would abort.

  Creates `folder` if it is missing. Unfinished checkpoints of a killed run are
  never read; they are deleted unless `folder` is a URL. Keeps the latest `keep`
  checkpoints and those at multiples of `keep_every`. `before_save` is called
  before a save starts.
  """

  def __init__(
    self,
    folder: Path,
    *,
    every_steps: int,
    keep: int = CheckpointConfig.keep,
    keep_every: int | None = CheckpointConfig.keep_every,
    retries: int = CheckpointConfig.retries,
    before_save: Callable[[], Any] = lambda: None,
  ):
    reading.silence_orbax_tracebacks()
    self.folder = reading.to_absolute(folder)
    self._keep, self._keep_every = keep, keep_every
    self._before_save = before_save
    self._retry = RetrySchedule(every_steps, retries)
    # Step of the pending save, and the exception raised when it was started.
    self._pending: int | None = None
    self._start_error: Exception | None = None
    # None after a failed save if the storage can't be reopened.
    self._manager: ocp.CheckpointManager | None = self._open()
    # Whether the storage is known to hold checkpoints.
    self._has_saved = bool(self._manager.all_steps())
    self._is_abandoned = False

  def _open(self) -> ocp.CheckpointManager:
    sync_fn = barrier.SaveBarrier() if jax.process_count() > 1 else None
    return ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        keep_period=self._keep_every or None,
        # Object stores lack renames, so Orbax treats a checkpoint without its
        # commit file as unfinished there, even if it was copied.
        cleanup_tmp_directories="://" not in str(self.folder),
        save_root_metadata=False,  # Only steps in `folder`.
        async_options=ocp.AsyncOptions(barrier_sync_fn=sync_fn),
      ),
    )

  def _open_manager(self) -> ocp.CheckpointManager:
    self._manager = self._manager or self._open()
    return self._manager

  def due(self, step: int) -> bool:
    """Whether to save: a multiple of `every_steps`, a retry, or step 1.

    The save at step 1 detects unusable storage early.
    """
    is_retry_due = self._retry.due_at is not None and step >= self._retry.due_at
    return step == 1 or step % self._retry.every_steps == 0 or is_retry_due

  def preempted(self, step: int) -> bool:
    """Whether to save and exit now because a process received SIGTERM.

    Every process must call it after every step. The processes agree on one
    future step; it is true on that step only.
    """
    return ocp.utils.reached_preemption(step)

  def save(
    self, step: int, state: Any, *, timing: Mapping[str, Any] | None = None
  ) -> None:
    """Starts a save of a tree of arrays; returns once they may be donated.

    Waits for an earlier save, then writes in the background; `poll` and `wait`
    report failures. Does nothing if the step is already saved. `timing` is
    JSON-serializable and restored with the state.
    """
    if error := self._finish():
      log.warning("%s", error)
    is_listed = step in self.listed_steps()
    if gather_json(is_listed)[0]:
      return
    if is_listed:  # By this process only, where Orbax would raise.
      self._open_manager().reload()
    self._before_save()
    flat = _flatten(state)
    for name, leaf in flat.items():
      if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(f"state/{name} is {leaf!r}, expected an array.")
    items = reading.make_json_items(flat, timing or {})
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(unflatten_names(flat)),
      **{name: ocp.args.JsonSave(item) for name, item in items.items()},
    )
    self._pending, self._start_error = step, None
    try:
      barrier.check_writable(self.folder)
      # `force`: the caller decides when to save.
      self._open_manager().save(step, args=args, force=True)
    except Exception as error:
      self._start_error = error

  @property
  def saving(self) -> bool:
    """Whether a save is in progress."""
    is_started = self._pending is not None and self._start_error is None
    return is_started and self._manager.is_saving_in_progress()

  def poll(self, step: int) -> None:
    """Checks whether the pending save has ended; call it every step.

    Raises CheckpointSaveError if the save failed and is not retried.
    """
    should_skip = jax.process_count() > 1 and step % _POLL_STEPS
    if self._pending is None or should_skip:
      return
    retry = self._retry
    # Once no retry is left, waits for the outcome of this save.
    if any_process(self.saving) and not retry.is_exhausted:
      return
    if error := self._finish():
      if not self._has_saved or retry.is_exhausted:
        raise error
      retry.postpone(step)
      log.warning(
        "%s Training continues; retry %d of %d after step %d.",
        error,
        retry.failures,
        retry.limit,
        retry.due_at,
      )

  def wait(self) -> None:
    """Waits for the pending save; raises CheckpointSaveError if it failed."""
    if error := self._finish():
      raise error

  def _finish(self) -> CheckpointSaveError | None:
    if self._pending is None:
      return None
    step, error, self._pending = self._pending, self._start_error, None
    try:
      if self._manager is not None:
        self._manager.wait_until_finished()
    except Exception as failure:
      error = error or failure
    cause = "another process failed"
    if error is not None:
      cause = barrier.describe_error(error)
    is_saved = not any_process(error is not None)
    if not is_saved:
      # Reopening also removes the partial files: the disk may be full.
      self._reopen()
      steps = self._list_steps()
      if is_saved := step in steps:
        log.warning("Saved step %d in %s, but %s.", step, self.folder, cause)
    if is_saved:
      self._has_saved = True
      self._retry.failures, self._retry.due_at = 0, None
      return None
    self._retry.failures += 1
    last = f"the last one is of step {max(steps)}" if steps else "there is none"
    save_error = CheckpointSaveError(
      f"the checkpoint of step {step} can't be written to {self.folder}"
      f" ({last}): {cause}."
    )
    save_error.__cause__ = error
    return save_error

  def _reopen(self) -> None:
    """Replaces the manager, whose state is undefined after a failed save."""
    with contextlib.suppress(Exception):
      self._manager.close()
    self._manager = None
    try:
      self._manager = self._open()
    except Exception as error:
      log.warning("%s can't be opened: %s", self.folder, error)

  def listed_steps(self) -> list[int]:
    """Steps of the complete checkpoints that this process has listed."""
    manager = self._manager
    return sorted(manager.all_steps()) if manager else self._list_steps()

  def _list_steps(self) -> list[int]:
    try:
      return reading.list_steps(self.folder)
    except OSError:
      return []

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, as process 0 lists them.

    Waits for the pending save.
    """
    self.wait()
    return gather_json(self.listed_steps())[0]

  def restore(
    self,
    abstract_state: Any,
    *,
    step: int | None = None,
    latest_good: bool = False,
  ) -> Restored | None:
    """Restores and verifies a checkpoint, possibly saved on another mesh.

    If any process can't read or verify it, all processes read it once more. If
    that fails, too, all raise.

    Args:
      abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings (or of
        arrays). Leaves without a sharding go to the first local device.
      step: the latest by default. Returns None if the run has no checkpoint.
      latest_good: if a checkpoint is damaged, rename it to `STEP.damaged` and
        restore the one before it.

    Raises:
      MissingFileError: the step does not exist.
      CheckpointMismatchError: names, shapes or types differ; lists them.
      DamagedCheckpointError: files are missing, truncated or changed.
      StorageError: the storage does not answer.
    """
    steps = self.steps()
    if step is None and not steps:
      return None
    step = steps[-1] if step is None else step
    reading.require_step(self.folder, step, steps)
    candidates = [s for s in reversed(steps) if s <= step]
    damaged_steps = []
    for candidate in candidates:
      try:
        restored = _restore_step(self.folder, abstract_state, candidate, steps)
        break
      except DamagedCheckpointError as error:
        if not latest_good or candidate == candidates[-1]:
          raise
        log.warning("%s", error)
        damaged_steps.append(candidate)
    # Renamed only now, so that a run without a good checkpoint keeps all.
    for damaged_step in damaged_steps:
      self._rename_damaged(damaged_step)
    return restored

  def _rename_damaged(self, step: int) -> None:
    """Renames a damaged checkpoint so that its step can be saved again."""
    path, error = self.folder / str(step), None
    names = (f"{step}.damaged{i or ''}" for i in itertools.count())
    name = next(name for name in names if not (self.folder / name).exists())
    if jax.process_index() == 0:
      try:
        path.rename(self.folder / name)
      except OSError as failure:
        error = failure
    if any_process(error is not None):
      cause = error or "process 0 failed"
      text = f"the damaged checkpoint {path} can't be renamed to {name}"
      raise CheckpointSaveError(f"{text}: {cause}.") from error
    log.warning("Renamed the damaged checkpoint %s to %s.", path, name)
    self._open_manager().reload()

  def survives_save(self, step: int) -> bool:
    """Whether a save now would keep the checkpoint of a step."""
    num_later = sum(s > step for s in self.steps())
    is_periodic = bool(self._keep_every) and step % self._keep_every == 0
    return is_periodic or num_later + 1 < self._keep

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints after a step, which the run will recompute."""
    for saved_step in self.steps():
      if saved_step > step:
        self._open_manager().delete(saved_step)

  def close(self) -> None:
    """Waits for the pending save and closes the manager; raises its error."""
    try:
      self.wait()
    finally:
      if self._manager is not None:
        self._manager.close()

  def abandon(self) -> None:
    """Skips the wait on exit, which would hang without the lost peers."""
    self._is_abandoned = True

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(
    self, kind: type | None, error: BaseException | None, trace: object
  ) -> None:
    if self._is_abandoned:
      return
    try:
      self.close()
    except CheckpointSaveError as save_error:
      if error is None:
        raise
      log.warning("%s", save_error)  # `error` ended the run: let it propagate.


def restore_from(folder: Path, abstract_state: Any, step: int) -> Restored:
  """Read-only `Checkpointer.restore`, without a `Checkpointer`.

  Raises the same errors.
  """
  folder = reading.to_absolute(folder)
  steps = reading.list_steps(folder)
  reading.require_step(folder, step, steps)
  return _restore_step(folder, abstract_state, step, steps)


def _restore_step(
  folder: Path, abstract_state: Any, step: int, steps: Sequence[int]
) -> Restored:
  try:
    return _read_checkpoint(folder, abstract_state, step, steps)
  except (DamagedCheckpointError, StorageError) as error:
    log.warning("%s\nReading it once more.", str(error))
  gc.collect()  # Cycles of tracebacks hold the arrays.
  return _read_checkpoint(folder, abstract_state, step, steps)


def _read_checkpoint(
  folder: Path, abstract_state: Any, step: int, steps: Sequence[int]
) -> Restored:
  """Reads and verifies a checkpoint; raises on all processes or on none."""
  path = folder / str(step)
  with _raise_on_all(), reading.report_damage(folder, step, steps):
    stored = reading.read_checksums(path)
    saved = reading.read_index(path / "state", stored)
    flat = _flatten(abstract_state)
    require_same(saved, flat, str(path))
    restore_args = {name: _make_restore_args(x) for name, x in flat.items()}
    arrays = reading.read_arrays(path / "state", flat, restore_args)
    timing = reading.read_timing(path)
  # Collective, so only after all processes have read.
  with _raise_on_all(), reading.report_damage(folder, step, steps):
    reading.verify_arrays(arrays, stored)
  structure = jax.tree.structure(abstract_state)
  return Restored(structure.unflatten(arrays.values()), timing, step)


@contextlib.contextmanager
def _raise_on_all() -> Iterator[None]:
  """Raises on all processes if the context raises on any of them.

  If all raise the same type, each raises its own error. Otherwise all raise
  DamagedCheckpointError if every error is one, else StorageError. Collective.
  """
  error = None
  try:
    yield
  except jax.errors.JaxRuntimeError:  # A device or a process failed.
    raise
  except Exception as failure:
    error = failure
  try:
    reports = gather_json(error and [type(error).__name__, str(error)])
    failed = [i for i, report in enumerate(reports) if report]
    if not failed:
      return
    error_types = {reports[i][0] for i in failed}
    if len(failed) == len(reports) and len(error_types) == 1:
      raise error
    subject = "No process can"
    if len(failed) < len(reports):
      subject = f"Only {name_processes(failed)} of {len(reports)} can't"
    is_damaged = error_types == {DamagedCheckpointError.__name__}
    raise (DamagedCheckpointError if is_damaged else StorageError)(
      f"{subject} read and verify a checkpoint: {reports[failed[0]][1]}"
    ) from error
  finally:
    del error  # Its traceback refers to this frame.


def _flatten(tree: Any) -> dict[str, Any]:
  return dict(flatten_with_names(tree))


def _make_restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    # By default Orbax uses the devices of the saved shardings, which this
    # machine may lack.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(
    sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype
  )
