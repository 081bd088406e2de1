"""Trains a config.

  python -m mtv_jax.main --config=configs/mtv_tiny.py --workdir=runs/a

A recipe takes arguments after a colon, and any key can be overridden:

  --config=siglip_b16_224:tiny,batch=64 --config.total_steps=100

The same command with the same workdir resumes from the last checkpoint. On a
pod, every host runs the same command with --distributed.
"""

import argparse
import contextlib

import jax

from mtv_jax.cli import arguments
from mtv_jax.config import schema
from mtv_jax.train import workdir
from mtv_jax.train.loop import train
from mtv_jax.train.metrics import setup_logging
from mtv_jax.utils import xla_flags


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
    train(config, args.workdir)
