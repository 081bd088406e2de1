"""Trains a config.

  python -m mtv_jax.main --config=configs/mtv_tiny.py --workdir=runs/a

A recipe takes arguments after a colon, and any key can be overridden:

  --config=siglip_b16_224:tiny,batch=64 --config.total_steps=100

The same command with the same workdir resumes from the last checkpoint. At the
end the folder has a report.html with curves, metrics and images. On a
pod, every host runs the same command with --distributed.
"""

import argparse
import contextlib
import logging
import shlex

import jax

from mtv_jax.cli import arguments
from mtv_jax.config import schema
from mtv_jax.perf.preflight import remat
from mtv_jax.studies.report import report
from mtv_jax.train import workdir
from mtv_jax.train.metrics import setup_logging
from mtv_jax.train.train import train
from mtv_jax.utils import xla_flags

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax train`."""
  arguments.add_config(parser)
  add = parser.add_argument
  text = "the run's folder: config, metrics, checkpoints, evaluations"
  add("--workdir", required=True, help=text)
  add(
    "--compile_cache",
    default="auto",
    help="folder of compiled programs, or none; auto (the default) is"
    " WORKDIR/compiled, and none on a CPU",
  )
  add(
    "--restore",
    default="latest",
    choices=("latest", "latest_good"),
    help="which checkpoint to resume from; latest_good skips damaged ones",
  )
  text = "stop at the first update that is not finite, and name the operation"
  add("--debug_nans", action="store_true", help=text)
  arguments.add_distributed(parser)


def run(args: argparse.Namespace) -> None:
  """Trains; resumes if the workdir has a checkpoint."""
  config = schema.check_config(arguments.read_config(args))
  arguments.initialize_distributed(args)
  process = jax.process_index()
  setup_logging(process_index=process)
  with contextlib.ExitStack() as stack:
    if process == 0:
      stack.enter_context(workdir.lock_workdir(args.workdir))
    xla_flags.enable_compilation_cache(args.compile_cache, args.workdir)
    if jax.default_backend() == "cpu":
      xla_flags.retain_freed_memory()
    train(
      remat.resolve_remat(config, args.workdir),
      args.workdir,
      command=_format_command(args),
      restore=args.restore,
      debug_nans=args.debug_nans,
    )
    if process == 0:
      write_report(args.workdir)


def write_report(folder: str) -> None:
  """Prints the last metrics with chance, and writes the run's report.

  An error is logged: the run is complete without a report.

  Raises:
    UploadError: it is not in the run's bucket.
  """
  try:
    with workdir.open_run_folder(folder) as run:
      if text := report.format_run(run.folder):
        with contextlib.suppress(OSError):  # A full disk, a closed terminal.
          print(f"\n{text}\n", flush=True)
      pages = report.write_runs([run.folder], run.folder)
      names = (f"{folder}/{page.name}" for page in pages)
      log.info("Wrote %s", ", ".join(names))
  except workdir.UploadError:
    raise
  except Exception as error:
    log.warning("No report of %s: %r", folder, error)


def _format_command(args: argparse.Namespace) -> str:
  """The command without the options of this machine."""
  words = [f"--config={args.config}", *(f"--config.{s}" for s in args.set)]
  words.append(f"--workdir={args.workdir}")
  return shlex.join(["mtv-jax", "train", *words])
