"""The training command.

  python -m mtv_jax.main --config=configs/mtv_tiny.py --workdir=runs/a

A config takes arguments after a colon and overrides of any key:

  --config=configs/siglip_b16_224.py:tiny,batch=64 --schema.total_steps=100

Started again with the same folder, a run goes on from its last checkpoint. On
a pod, every host runs the same command with `--distributed`.
"""

import contextlib

import jax
from absl import app, flags

from mtv_jax.cli import errors
from mtv_jax.config import overrides, schema
from mtv_jax.parallel import distributed
from mtv_jax.train import workdir
from mtv_jax.train.loop import train
from mtv_jax.train.metrics import setup_logging
from mtv_jax.utils import compile_cache

_CONFIG = flags.DEFINE_string(
  "config", None, "The recipe, with its arguments after a colon."
)
_SET = flags.DEFINE_multi_string(
  "set", [], "KEY=VALUE; the same as --config.KEY=VALUE."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder: config, metrics, checkpoints."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other hosts. On a TPU pod, SLURM or Open MPI they find each other; "
  "elsewhere give the three flags below.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0. Implies --distributed."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.")
_COMPILE_CACHE = flags.DEFINE_string(
  "compile_cache",
  "auto",
  "Folder of compiled programs. 'auto' is WORKDIR/compiled, but none on a CPU; "
  "'none' is none.",
)


def _parse(argv):
  """absl's parser, after what it doesn't know: --config.KEY=VALUE."""
  with errors.readable_errors("train"):
    argv = overrides.from_flags(argv)
  return app.parse_flags_with_usage(argv)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(
      f"what is {argv[1:]}? Overrides are written --config.KEY=VALUE."
    )
  with errors.readable_errors("train"):
    recipe = schema.check_config(
      overrides.override(schema.read_config(_CONFIG.value), _SET.value)
    )
    distributed.initialize(
      distributed=_DISTRIBUTED.value,
      coordinator=_COORDINATOR.value,
      processes=_PROCESSES.value,
      process=_PROCESS.value,
    )
    process = jax.process_index()
    setup_logging(process_index=process)
    alone = contextlib.nullcontext()
    if process == 0:
      alone = workdir.lock_workdir(_WORKDIR.value)
    with alone:
      compile_cache.enable(_COMPILE_CACHE.value, _WORKDIR.value)
      train(recipe, _WORKDIR.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=_parse)
