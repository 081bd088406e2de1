"""Trains a config.

  python -m mtv_jax.main --config=configs/mtv_tiny.py --workdir=runs/a

A recipe takes arguments after a colon, and any key can be overridden:

  --config=siglip_b16_224:tiny,batch=64 --config.total_steps=100

Rerunning the command resumes from the workdir's last checkpoint. A finished run
writes report.html with curves, metrics and images. On a pod, run the command
on every host with --distributed.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
from typing import Any, Literal

import jax

from mtv_jax.cli import arguments
from mtv_jax.config import overrides, recipes
from mtv_jax.config.sections import Config
from mtv_jax.hooks.evaluation import EvaluationHook
from mtv_jax.hooks.samples import Samples
from mtv_jax.models.remat import AUTO
from mtv_jax.parallel.distributed import agree, gather_json
from mtv_jax.train import train as train_lib
from mtv_jax.train import workdir
from mtv_jax.train.config import RunConfig, check_config, resolve
from mtv_jax.train.hooks import Hook
from mtv_jax.train.metrics import setup_logging
from mtv_jax.train.runtime import peers
from mtv_jax.train.spec import TrainState
from mtv_jax.utils import progress, xla_flags

log = logging.getLogger(__name__)


class Flags(arguments.ConfigFlags, arguments.DistributedFlags):
  """Flags of `mtv-jax train`.

  Args:
    workdir: folder for config, metrics, checkpoints and evaluations.
    compile_cache: folder or bucket of compiled programs, or none; auto (the
      default) is WORKDIR/compiled. On CPUs, a subfolder of it named after the
      processor.
    restore: checkpoint to resume from; latest_good skips damaged ones.
    debug_nans: stop at the first non-finite update and name the operation.
    allow_scene_evals: start a run on a TPU or several hosts even if it is
      evaluated only on rendered scenes.
    dry_run: open data, tokenizer, labels and evaluations, read one batch, say
      what would happen, and exit; compiles and writes nothing.
  """

  workdir: str
  compile_cache: str = "auto"
  restore: Literal["latest", "latest_good"] = "latest"
  debug_nans: bool = False
  allow_scene_evals: bool = False
  dry_run: bool = False


def run(args: Flags) -> None:
  """Trains; resumes if the workdir has a checkpoint."""
  # Shells don't expand ~ after "=".
  args = dataclasses.replace(args, workdir=os.path.expanduser(args.workdir))
  recipe = arguments.read_config(args)
  config = check_config(recipe)  # Before hosts connect.
  arguments.initialize_distributed(args)
  process = jax.process_index()
  setup_logging(process_index=process)
  if process:
    progress.mute()
  seconds = config.watchdog.peer_seconds
  with contextlib.ExitStack() as stack:
    with peers.watch_peers(seconds), peers.exit_on_lost_peer():
      workdir.check_workdir(args.workdir)
      config = choose_settings(recipe, config, args)
      if args.dry_run:
        config = choose_remat(config, args.workdir, search=False)
        text = dry_run(config, args.workdir, **_select_options(args))
        if process == 0:
          print(text)
        return
      if process == 0:
        stack.enter_context(workdir.lock_workdir(args.workdir))
      config = resolve(config, args.workdir)
      xla_flags.enable_compilation_cache(args.compile_cache, args.workdir)
      if jax.default_backend() == "cpu":
        xla_flags.retain_freed_memory()
      config = choose_remat(config, args.workdir)
    train(
      config,
      args.workdir,
      command=_format_command(args),
      **_select_options(args),
    )
    if process == 0:
      write_report(args.workdir)


def build_hooks(*, allow_scene_evals: bool = False) -> list[Hook]:
  """Samples of the first batch, and the evaluations of the config."""
  return [Samples(), EvaluationHook(allow_scenes=allow_scene_evals)]


def train(
  config: Config | RunConfig,
  workdir: str | os.PathLike,
  *,
  allow_scene_evals: bool = False,
  **options: Any,
) -> TrainState:
  """Trains with the hooks of `mtv-jax train`, see `train.train.train`."""
  hooks = build_hooks(allow_scene_evals=allow_scene_evals)
  return train_lib.train(config, workdir, hooks=hooks, **options)


def dry_run(
  config: Config | RunConfig,
  workdir: str | os.PathLike,
  *,
  allow_scene_evals: bool = False,
  **options: Any,
) -> str:
  """Describes a run with its hooks, see `train.train.dry_run`."""
  hooks = build_hooks(allow_scene_evals=allow_scene_evals)
  return train_lib.dry_run(config, workdir, hooks, **options)


def _select_options(args: Flags) -> dict[str, Any]:
  names = ("restore", "debug_nans", "allow_scene_evals")
  return {name: getattr(args, name) for name in names}


def choose_settings(
  recipe: Config, config: RunConfig, args: Flags
) -> RunConfig:
  """Applies the recipe's settings for this run's TPUs.

  `config` is the recipe, checked. An existing run keeps whichever settings are
  closer to its config.json.
  """
  if jax.default_backend() != "tpu":
    return config
  from mtv_jax.perf import topologies

  name = topologies.name_devices(jax.devices())
  if not (settings := recipes.read_settings(args.config, name)):
    return config
  # The command's overrides take precedence.
  tuned_config = check_config(
    overrides.override(recipe, [*settings, *args.set])
  )
  if recorded := workdir.read_recorded_config(args.workdir):
    count = functools.partial(_count_changes, recorded)
    return min(config, tuned_config, key=count)
  for line in overrides.describe_difference(
    config.to_dict(), tuned_config.to_dict()
  ):
    log.info("Setting of the recipe for %s: %s", name, line)
  return tuned_config


def _count_changes(recorded: Any, config: RunConfig) -> int:
  return len(overrides.list_differences([recorded, config.to_dict()]))


def choose_remat(
  config: RunConfig, folder: str, *, search: bool = True
) -> RunConfig:
  """Replaces `remat='auto'` with 'auto:CHOICE', equal in all processes.

  A resumed run reuses the choice recorded in its folder. CPU runs use 'none',
  and so do runs that don't `search`. Accelerators compile candidates, see
  `perf.preflight.search.find_remat`.
  """
  agree({"config": {"model": {"remat": config.model.remat}}})
  if config.model.remat.strip() != AUTO:
    return config
  choice = AUTO
  if jax.process_index() == 0:  # It may write the file before peers read it.
    recorded_model = workdir.read_recorded_config(folder).get("model", {})
    choice = recorded_model.get("remat", AUTO).removeprefix(f"{AUTO}:")
  choice = gather_json(choice)[0]
  note = ", as in the run's config.json" if choice != AUTO else ""
  if choice == AUTO and not search:
    choice, note = "none", "; training will compile candidates"
  if choice == AUTO:
    from mtv_jax.perf import topologies
    from mtv_jax.perf.preflight.search import find_remat

    choice, topology = "none", topologies.describe_local()
    if topology.chip.kind != "cpu":
      choice = find_remat(config, topology).remat
  log.info("config.model.remat='auto' is %r%s.", choice, note)
  model = dataclasses.replace(config.model, remat=f"{AUTO}:{choice}")
  return dataclasses.replace(config, model=model)


def write_report(folder: str) -> None:
  """Prints the last metrics beside chance level, and writes the run's report.

  Only a failed upload raises: the run is complete even without a report.
  """
  try:
    from mtv_jax.report import runs  # Slow import, not needed to train.

    with workdir.open_run_folder(folder) as run:
      if text := runs.format_run(run.path):
        with contextlib.suppress(OSError):  # Full disk or closed terminal.
          print(f"\n{text}\n", flush=True)
      pages = runs.write_runs([run.path], run.path)
      names = (f"{folder}/{page.name}" for page in pages)
      log.info("Wrote %s", ", ".join(names))
  except workdir.UploadError:
    raise
  except Exception as error:
    log.warning("No report for %s: %r", folder, error)


def _format_command(args: Flags) -> str:
  """The command without machine-specific options."""
  words = [f"--config={args.config}", *(f"--config.{s}" for s in args.set)]
  return shlex.join(["mtv-jax", "train", *words, f"--workdir={args.workdir}"])
