"""Trains a config: builds, restores, runs the steps, rolls back."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax

from mtv_jax.checkpoint.checkpointer import (
  Checkpointer,
  Restored,
  restore_from,
)
from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.config.overrides import describe_difference, list_differences
from mtv_jax.config.sections import Config
from mtv_jax.data import order
from mtv_jax.data.sources.tar_index import temporary_indices
from mtv_jax.data.stats import Stats
from mtv_jax.parallel.distributed import agree, gather_json
from mtv_jax.train import describe, rollback
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.hooks import Hook
from mtv_jax.train.initialization import fit_statistics, initialize_state
from mtv_jax.train.metrics import Chrono, MetricWriter
from mtv_jax.train.param_source import open_param_source
from mtv_jax.train.rollback import RollbackError, UpdateMonitor
from mtv_jax.train.run import (
  Run,
  make_loader,
  open_run,
  save_config,
)
from mtv_jax.train.runtime import peers, preemption, sessions
from mtv_jax.train.runtime.prefetch import BackgroundLoader
from mtv_jax.train.runtime.profiler import StepProfiler
from mtv_jax.train.runtime.watchdog import Watchdog
from mtv_jax.train.spec import TrainState
from mtv_jax.train.train_loop import Trainer
from mtv_jax.train.workdir import (
  CHECKPOINTS,
  END,
  RunFolder,
  open_run_folder,
  read_recorded_config,
)
from mtv_jax.utils import atomic, progress
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.text import list_first

log = logging.getLogger(__name__)


def check_balance_unchanged(
  config: RunConfig, workdir: str | os.PathLike
) -> None:
  """Raises ConfigError if a run was trained with a different balancing method.

  Checkpoints don't reveal it: some methods are stateless.
  """
  if not (recorded := read_recorded_config(workdir)):
    return
  # Older configs lack `method`; without a section, weights are fixed.
  section = recorded.get("balance")
  old = section.get("method", "grad_norm_mean") if section else "fixed"
  new = config.balance.method if config.balance else "fixed"
  if old != new:
    raise ConfigError(
      f"config.balance.method is {new!r}, but {workdir} has used {old!r} "
      "so far. Resume with the config.balance of its config.json "
      "(--config.balance=None for fixed weights), or choose another workdir."
    )


def _collect_agreed_values(run: Run, **options: Any) -> dict[str, Any]:
  """Returns what all processes of a run must agree on, as JSON."""
  config = run.config.to_dict()
  code = {"digest": sessions.code_digest(config)}
  return {
    "config": config,
    "options": options,
    "code": code | sessions.package_versions(),
    "data": run.source_descriptions,
    "checkpoints": saved_steps(run.workdir),
  }


def _open_run(
  config: RunConfig,
  workdir: str | os.PathLike,
  hooks: Sequence[Hook] = (),
  **options: Any,
) -> Run:
  """Builds a run and opens its hooks; processes must agree."""
  run = open_run(config, workdir)
  if jax.process_count() > 1:
    agree(_collect_agreed_values(run, **options))
  for hook in hooks:
    hook.open(run)
  return run


def warn_of_changed_data(
  old: Sequence[Any] | None, new: Sequence[Any], step: int
) -> None:
  """Warns if the sources differ from a checkpoint's (None: unknown)."""
  lines = describe_difference({"data": old}, {"data": new}) if old else []
  if lines:
    log.warning(
      f"The training data has changed since step {step}, so the next rows"
      f" differ from an uninterrupted run's: {list_first(lines, 3)}."
    )


@temporary_indices()
def dry_run(
  config: Config | RunConfig,
  workdir: str | os.PathLike,
  hooks: Sequence[Hook] = (),
  **options: Any,
) -> str:
  """Opens what `train` opens and reads one batch; describes the run.

  Writes nothing into `workdir`, compiles nothing and reads neither weights nor
  checkpoints. Raises the errors of `train`; `options` are arguments of `train`.
  Collective: all processes call it.
  """
  config = resolve(config, workdir)
  run = _open_run(config, workdir, hooks, **options)
  step = max(saved_steps(workdir), default=0)
  if step:
    check_balance_unchanged(config, workdir)
  elif config.init:
    init = config.init  # Raises if there is nothing to load.
    check_source = open_param_source().check_source
    check_source(init.path, weights=init.weights, step=init.step)
  if reason := _read_end(run, step):
    start = [f"Stopped by a bound: {reason}; nothing left to train."]
  else:
    start = describe.describe_start(run, step)
  return "\n".join(
    [
      f"Dry run of {workdir}: nothing is compiled or written.",
      *describe.describe_run(run, hooks),
      *start,
    ]
  )


def train(
  config: Config | RunConfig,
  workdir: str | os.PathLike,
  *,
  command: str = "",
  restore: Literal["latest", "latest_good"] = "latest",
  debug_nans: bool = False,
  hooks: Sequence[Hook] = (),
) -> TrainState:
  """Trains a config in a folder, from the start or the last checkpoint.

  All hosts use one `workdir`, which records the `command` for reports.
  `restore="latest_good"` skips damaged checkpoints. `debug_nans` raises at the
  first non-finite update, naming the operation. `hooks` add what runs around
  the updates, such as `hooks.evaluation.EvaluationHook`. Returns the state
  after the last step.

  Raises:
    ConfigError: the config is invalid.
    ProcessMismatchError: processes differ in config, code, data or checkpoints.
    NonFiniteError: too many updates are non-finite.
    rollback.BoundError: an evaluation is out of bounds.
    data.stats.CorruptDataError: too many records are unusable.
    preemption.Preempted: a signal was received, and a checkpoint is saved.
    watchdog.StalledError: a step took too long; saved if possible.
    checkpointer.DamagedCheckpointError: the last checkpoint is damaged.
    checkpointer.CheckpointSaveError: checkpoints can't be written.
  """
  config = resolve(config, workdir)
  seconds = config.watchdog.peer_seconds
  with contextlib.ExitStack() as stack:
    enter, index = stack.enter_context, jax.process_index()
    # A process that fails to open its data or the folder ends the others.
    with (
      progress.activity("opening the data"),
      peers.watch_peers(seconds),
      peers.exit_on_lost_peer(),
    ):
      run = _open_run(
        config,
        workdir,
        hooks,
        restore=restore,
        debug_nans=debug_nans,
      )
      run_folder = enter(open_run_folder(workdir, process_index=index))
      run = dataclasses.replace(run, workdir=run_folder.path)
      checkpoints = enter(_open_checkpoints(run, run_folder))
    notice = enter(preemption.catch_signals())
    enter(peers.watch_peers(seconds, when_alone=checkpoints.abandon))
    # Exits before the contexts above, which would wait for lost processes.
    enter(peers.exit_on_lost_peer())
    describe.log_run(run, hooks)
    chrono = Chrono(
      total_steps=run.total_steps,
      batch_size=config.batch_size,
      devices=run.mesh.size,
    )
    if checkpoints.steps():
      check_balance_unchanged(config, workdir)
    return _train_with_rollbacks(
      run,
      workdir,
      checkpoints,
      latest_good=restore == "latest_good",
      chrono=chrono,
      notice=notice,
      command=command,
      debug_nans=debug_nans,
      hooks=hooks,
    )


def _open_checkpoints(run: Run, run_folder: RunFolder) -> Checkpointer:
  """Opens the run's checkpoints."""
  options = run.config.checkpoint

  def before_save() -> None:
    with contextlib.suppress(OSError):  # The save itself reports these.
      if not (run.workdir / "config.json").exists():
        # The folder was deleted meanwhile; its checkpoints need the config.
        save_config(run, is_new=False)
    run_folder.upload()  # The metrics up to this checkpoint.

  return Checkpointer(
    path_lib.as_path(run_folder.url) / CHECKPOINTS,
    every_steps=run.length.steps(options.every),
    keep=options.keep,
    keep_every=options.keep_every,
    retries=options.retries,
    before_save=before_save,
  )


def _train_with_rollbacks(
  run: Run,
  workdir: str | os.PathLike,
  checkpoints: Checkpointer,
  *,
  latest_good: bool,
  **options: Any,
) -> TrainState:
  """Trains from the last checkpoint; on RollbackError, from an earlier one.

  `options` are further arguments of `_train_from`.
  """
  saved = checkpoints.restore(run.train_step.abstract, latest_good=latest_good)
  if saved is not None:
    log.info("Resumed %s at step %d.", workdir, saved.step)
    if reason := gather_json(_read_end(run, saved.step))[0]:
      log.warning(
        f"{workdir} was stopped by a bound: {reason}, and it returned to the "
        f"checkpoint of step {saved.step}. A changed config continues training."
      )
      return saved.state
  elif (init := run.config.init) and init.branch:
    saved = _restore_branch(run)
    log.info("Continues %s from step %d on.", init.path, saved.step)
  ranges = saved.timing.get("skipped_batches", ()) if saved else ()
  skipped = tuple((int(first), int(count)) for first, count in ranges)
  if jax.process_index() == 0:
    with contextlib.suppress(OSError):  # An error here would block the others.
      (run.workdir / END).unlink()
  rollbacks = 0
  while True:
    try:
      return _train_from(
        run, saved, skipped=skipped, checkpoints=checkpoints, **options
      )
    except RollbackError as error:
      failure = error.with_traceback(None)
    # Outside the handler, which would keep the old state alive.
    rollbacks += 1
    saved = _restore_before(
      run, checkpoints, failure, rollbacks, latest_good=latest_good
    )
    if failure.then == "return":
      _record_end(run, saved.step, failure.what)
      return saved.state
    skipped = order.skip_steps(failure.first - 1, failure.last - 1, skipped)


def _record_end(run: Run, step: int, reason: str) -> None:
  """Records that a bound ended the run at the checkpoint of `step`."""
  if jax.process_index() == 0:
    config = run.config.to_dict()
    end = {"step": step, "reason": reason, "config": config}
    path = run.workdir / END
    try:
      atomic.write_text(path, json.dumps(end, indent=2))
    except OSError as error:  # The other processes return normally.
      log.warning(
        "%s can't be written (%s): a restart would train on.", path, error
      )


def _read_end(run: Run, step: int) -> str | None:
  """Why a bound ended a run of this config at `step`; None if none did."""
  end = path_lib.read_json(run.workdir / END, tolerant=True)
  if not isinstance(end, dict) or end.get("step") != step:
    return None
  config = end.get("config")
  config = config if isinstance(config, dict) else {}
  configs = [config, run.config.to_dict()]
  return None if list_differences(configs) else str(end.get("reason"))


def _restore_branch(run: Run) -> Restored:
  """Restores the run that `config.init.branch` continues."""
  init, total = run.config.init, run.total_steps
  check_balance_unchanged(run.config, init.path)
  folder = path_lib.as_path(init.path) / CHECKPOINTS
  saved = restore_from(folder, run.train_step.abstract, init.step)
  if saved.step >= total:
    raise ConfigError(
      f"config.init.branch continues {init.path} from step {saved.step} on, "
      f"but this run ends at step {total}: set an earlier config.init.step, or "
      "more steps."
    )
  return saved


def _restore_before(
  run: Run,
  checkpoints: Checkpointer,
  failure: RollbackError,
  rollbacks: int,
  *,
  latest_good: bool,
) -> Restored:
  """Restores the last checkpoint before `failure.first`; deletes later ones.

  With `latest_good`, skips damaged checkpoints.
  """
  options = run.config.nonfinite
  steps = checkpoints.steps()
  step = max((s for s in steps if s < failure.first), default=None)
  listing = f"Checkpoints of steps: {', '.join(map(str, steps)) or 'none'}."
  what, hint, error_type = failure.what, failure.hint, failure.error_type
  if step is None:
    raise error_type(f"{what}, but no checkpoint precedes that. {hint}")
  then = failure.then or options.then
  should_stop, limit = then == "stop", options.max_rollbacks
  if should_stop or (then == "rollback" and rollbacks > limit):
    why = f"{failure.then_key} is 'stop'"
    if not should_stop:
      why = f"the run has returned to a checkpoint {rollbacks - 1} times"
    raise error_type(
      f"{what}, and {why}. {listing} The checkpoint of step {step} precedes it."
      f" {hint}"
    )
  saved = checkpoints.restore(
    run.train_step.abstract, step=step, latest_good=latest_good
  )
  # After restoring, so that a damaged checkpoint does not delete later ones.
  checkpoints.delete_after(saved.step)
  log.warning(
    f"{what.capitalize()}: returns to the checkpoint of step {saved.step} and "
    + ("skips the bad batches." if then == "rollback" else f"ends. {hint}")
  )
  return saved


def _train_from(
  run: Run,
  saved: Restored | None,
  *,
  skipped: order.SkippedBatches,
  checkpoints: Checkpointer,
  chrono: Chrono,
  notice: preemption.Notice,
  command: str,
  debug_nans: bool,
  hooks: Sequence[Hook],
) -> TrainState:
  """Trains from a checkpoint (None: from step 0) to the last step."""
  config = run.config
  start_step, timing = (saved.step, saved.timing) if saved else (0, {})
  stats = _restore_times_and_stats(run, saved, chrono) if saved else None
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    watchdog = enter(Watchdog(config.watchdog))

    def is_interrupted():
      # Multiple processes save together, so none may stop alone: if a reader
      # stalls, the watchdog exits.
      is_alone = jax.process_count() == 1
      return is_alone and (notice.received or watchdog.expired)

    loader = make_loader(run, start_step, skipped, stats)
    batches = enter(BackgroundLoader(loader, is_interrupted))
    writer = enter(_open_writer(run, start_step, skipped))
    session = enter(_open_session(run, start_step, command))
    notice.before_exit = session.close
    folder = run.workdir / "profile"
    profiler = enter(StepProfiler(folder, config.log.profile_steps))
    # Only now: a rejected config must not replace the recorded one.
    save_config(run, command, is_new=saved is None)
    if saved:
      state = saved.state
    else:
      state = fit_statistics(run, initialize_state(run))
    return Trainer(
      run=run,
      state=state,
      start_step=start_step,
      batches=batches,
      skipped=skipped,
      checkpoints=checkpoints,
      writer=writer,
      chrono=chrono,
      notice=notice,
      watchdog=watchdog,
      monitor=_restore_monitor(config, timing),
      session=session,
      profiler=profiler,
      hooks=[*_build_measurements(run), *hooks],
      debug_nans=debug_nans,
    ).train()


def _build_measurements(run: Run) -> list[Hook]:
  """The hook that measures gradients, if the config measures any."""
  config = run.config
  if not (config.balance or config.interference or config.log.gradients):
    return []
  from mtv_jax.train.measurements import MeasureGradients

  return [MeasureGradients()]


def _open_session(run: Run, step: int, command: str) -> sessions.Session:
  digest = sessions.code_digest(run.config.to_dict())
  return sessions.Session(
    run.workdir,
    start_step=step,
    devices=sessions.describe_devices(),
    command=command,
    process_index=jax.process_index(),
    facts={"digest": digest, **describe.describe_facts(run)},
  )


def _restore_monitor(
  config: RunConfig, timing: dict[str, Any]
) -> UpdateMonitor:
  return UpdateMonitor(
    max_consecutive=config.nonfinite.max_consecutive,
    spike_factor=config.log.spikes,
    **{k: timing[k] for k in rollback.SAVED if k in timing},
  )


def _restore_times_and_stats(
  run: Run, saved: Restored, chrono: Chrono
) -> Stats | None:
  """Restores the run's times; returns its data statistics on process 0."""
  timing = saved.timing
  chrono.from_dict(timing)
  if jax.process_index():  # Others don't report them.
    return None
  descriptions = timing.get("sources"), run.source_descriptions
  warn_of_changed_data(*descriptions, step=saved.step)
  return Stats.from_dict(timing.get("data", {}))


def _open_writer(
  run: Run, step: int, skipped: order.SkippedBatches
) -> MetricWriter:
  """Opens the metric writer of a session that starts after `step` updates."""
  return MetricWriter(
    run.workdir,
    total_steps=run.total_steps,
    start_step=step,
    process_index=jax.process_index(),
    trackers=run.trackers,
    config=run.config.to_dict(),
    # Batches that a rollback skipped are not repeated, so their rows stay.
    keep_row=lambda row: order.is_skipped(row.get("batch"), skipped),
  )
