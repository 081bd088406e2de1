"""Benchmarks of this machine, each against a limit measured in the same run.

  mtv-jax bench data --data='cc3m/*.tar' --tokenizer=spiece.model
  mtv-jax bench decoding --data='cc3m/*.tar' --megapixels=0,1,4
  mtv-jax bench step --config=siglip_b16_224:tiny
  mtv-jax bench views --config=mtv_b16_224:tiny
  mtv-jax bench interference --config=mtv_tiny
  mtv-jax bench gradient_norms --workdir=runs/a --after=30
  mtv-jax bench eval --encoder=random:S/16
  mtv-jax bench checkpoint --config=siglip_b16_224:tiny
  mtv-jax bench flops --config=mtv_b16_224 --compile=whole
  mtv-jax bench against --what=siglip
  mtv-jax bench experts --kind=depth

`--profile=DIR` also writes a trace, for TensorBoard or Perfetto.
"""

import argparse
import contextlib
import inspect
import pkgutil
from pathlib import Path

import jax

from mtv_jax.cli import arguments
from mtv_jax.utils import atomic

# {name: (function, help)}.
COMMANDS = {
  "data": ("bench.data:run", "input pipeline against decoding alone"),
  "decoding": ("bench.decoding:run", "decoding photos; DINOv2's views"),
  "step": ("bench.step:run", "train step against matrix products"),
  "views": ("bench.step:time_views", "views against the step and decoding"),
  "interference": ("bench.step:time_interference", "meter against the step"),
  "gradient_norms": (
    "bench.step:measure_norms",
    "balance of a run's gradients",
  ),
  "eval": ("bench.evals:run", "images to features against the forward pass"),
  "checkpoint": ("bench.checkpoints:run", "saving, restoring against the disk"),
  "flops": ("flops:run", "FLOPs of each part of a train step; runs nothing"),
  "against": ("bench.against_torch:run", "train step against PyTorch's"),
  "experts": ("bench.experts:run", "labelling against transformers"),
}


class Overrides(arguments.Flags):
  """Config overrides.

  Args:
    set: KEY=VALUE; same effect as --config.KEY=VALUE.
  """

  set: list[str] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds a subcommand for each benchmark."""
  commands = parser.add_subparsers(
    dest="benchmark", required=True, metavar="BENCHMARK"
  )
  for name, (path, text) in COMMANDS.items():
    command = commands.add_parser(name, help=text)
    function = pkgutil.resolve_name(f"mtv_jax.perf.{path}")
    arguments.add_parameters(command, function)
    if "config" in inspect.signature(function).parameters:
      arguments.add_parameters(command, Overrides)
    command.add_argument("--json", type=Path, help="also write the result here")
    command.add_argument("--profile", metavar="DIR", help="also write a trace")
    command.set_defaults(function=function)


def run(args: argparse.Namespace) -> None:
  """Runs one benchmark; prints and writes its result."""
  flags = inspect.signature(args.function).parameters
  values = {name: getattr(args, name) for name in flags}
  if "config" in values:
    recipe = arguments.ConfigFlags(config=args.config, set=args.set)
    values["config"] = arguments.read_config(recipe)
  with contextlib.ExitStack() as stack:
    if args.profile:
      # Traces of Python calls, mostly of compilation, take gigabytes.
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0
      trace = jax.profiler.trace(args.profile, profiler_options=options)
      stack.enter_context(trace)
    result = args.function(**values)
  print(result)
  if args.json:
    atomic.write_text(args.json, result.to_json() + "\n")
