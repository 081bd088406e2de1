"""Measures speed on this machine, each thing beside its floor.

  python tools/bench.py data --data='cc3m/*.tar' --tokenizer=spiece.model
  python tools/bench.py step --config=configs/siglip_b16_224.py:tiny
  python tools/bench.py views --config=configs/mtv_b16_224.py:tiny
  python tools/bench.py eval --model=random:S/16
  python tools/bench.py checkpoint --config=configs/siglip_b16_224.py:tiny
  python tools/bench.py flops --config=configs/mtv_b16_224.py --compile=whole
  python tools/bench.py against --what=siglip

`data` prints images a second for the input pipeline (tars to batches) beside
OpenCV decoding and resizing the same images, in the same run. `step` prints the
median time of a config's train step, alone and behind its input pipeline, and
its share of what large matrix products reach in the same run. `views` prints
what views cost beside the step and beside decoding on the host, `eval` how far
an encoder falls behind its forward pass, `checkpoint` the speed of saving and
restoring beside the disk's, and what saving takes from a run. `flops` prints
what each encoding and head of a step costs, and what one step costs against a
run for each objective; it computes nothing. `against` times a step and
`experts` a labelling network beside PyTorch's, on a CPU.

`--profile=DIR` also writes a trace, for TensorBoard or Perfetto.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from mtv_jax.cli import errors


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
  return value


def _add_config(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--config", required=True, help="a file, with its arguments after a colon"
  )


def _add_data(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("data", help="tars to batches, on the host")
  parser.add_argument("--data", help="tars; scenes are rendered without it")
  parser.add_argument(
    "--size", type=_positive, default=384, help="of the canvas"
  )
  parser.add_argument(
    "--length", type=_positive, default=64, help="tokens a caption"
  )
  parser.add_argument("--tokenizer", default="bytes", help="or a file's path")
  parser.add_argument("--batch-size", type=_positive, default=64)
  parser.add_argument(
    "--batches", type=_positive, default=12, help="in a round"
  )
  parser.add_argument("--rounds", type=_positive, default=5)
  parser.add_argument("--threads", type=_positive, help="default: one a core")
  parser.add_argument("--workers", type=int, default=0, help="processes")
  parser.set_defaults(run=_data)


def _data(args: argparse.Namespace) -> object:
  from mtv_jax.perf.bench import data

  return data.bench_data(
    args.data,
    size=args.size,
    length=args.length,
    tokenizer=args.tokenizer,
    batch_size=args.batch_size,
    batches=args.batches,
    rounds=args.rounds,
    threads=args.threads,
    workers=args.workers,
  )


def _add_step(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("step", help="the train step of a config")
  _add_config(parser)
  parser.add_argument("--steps", type=_positive, default=20, help="to time")
  parser.set_defaults(run=_step)


def _step(args: argparse.Namespace) -> object:
  from mtv_jax.config import schema
  from mtv_jax.perf.bench import step

  return step.bench_step(schema.read_config(args.config), steps=args.steps)


def _add_views(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("views", help="made on the device, by a config")
  _add_config(parser)
  parser.add_argument("--steps", type=_positive, default=5, help="to time")
  parser.set_defaults(run=_views)


def _views(args: argparse.Namespace) -> object:
  from mtv_jax.config import schema
  from mtv_jax.perf.bench import views

  return views.bench_views(schema.read_config(args.config), steps=args.steps)


def _add_eval(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("eval", help="an encoder's speed")
  parser.add_argument(
    "--model", default="random:S/16", help="a run, an export or a baseline"
  )
  parser.add_argument(
    "--images", type=_positive, default=256, help="of a round"
  )
  parser.add_argument("--batch-size", type=_positive, default=64)
  parser.add_argument("--rounds", type=_positive, default=3)
  parser.add_argument("--dtype", default="float32")
  parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> object:
  from mtv_jax.perf.bench import evals

  return evals.bench_eval(
    args.model,
    images=args.images,
    batch_size=args.batch_size,
    rounds=args.rounds,
    dtype=args.dtype,
  )


def _add_checkpoint(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("checkpoint", help="saving and restoring")
  _add_config(parser)
  parser.add_argument(
    "--steps", type=_positive, default=10, help="to time while nothing is saved"
  )
  parser.add_argument("--saves", type=_positive, default=3)
  parser.add_argument(
    "--every", type=_positive, default=100, help="steps a save, of the run"
  )
  parser.add_argument("--folder", help="on the disk to save to")
  parser.set_defaults(run=_checkpoint)


def _checkpoint(args: argparse.Namespace) -> object:
  from mtv_jax.config import schema
  from mtv_jax.perf.bench import checkpoints

  return checkpoints.bench_checkpoint(
    schema.read_config(args.config),
    steps=args.steps,
    saves=args.saves,
    every=args.every,
    folder=args.folder,
  )


def _add_against(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("against", help="a step beside PyTorch's")
  parser.add_argument(
    "--what", default="siglip", help="or distillation (DINO and iBOT)"
  )
  parser.add_argument("--batch-size", type=_positive, default=16)
  parser.add_argument("--rounds", type=_positive, default=3)
  parser.add_argument("--steps", type=_positive, default=1, help="of a round")
  parser.add_argument("--threads", type=_positive, default=2)
  parser.set_defaults(run=_against)


def _against(args: argparse.Namespace) -> object:
  from mtv_jax.perf.bench import against_torch

  return against_torch.bench_against(
    args.what,
    batch_size=args.batch_size,
    rounds=args.rounds,
    steps=args.steps,
    threads=against_torch.pin(args.threads),
  )


def _add_experts(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("experts", help="labelling, beside PyTorch's")
  parser.add_argument("--kind", required=True, help="depth or boxes")
  parser.add_argument("--variant", default="S", help="size of the expert")
  parser.add_argument("--batch-size", type=_positive, default=1)
  parser.add_argument("--rounds", type=_positive, default=5)
  parser.add_argument(
    "--against", choices=("transformers", "none"), default="transformers"
  )
  parser.add_argument("--threads", type=_positive, default=2)
  parser.add_argument(
    "--topology", help="compile for it instead, such as v5e:2x2; times nothing"
  )
  parser.set_defaults(run=_experts)


def _experts(args: argparse.Namespace) -> object:
  from mtv_jax.perf import topologies
  from mtv_jax.perf.bench import experts

  if args.topology:
    topologies.use_cpu(args.topology)
    return experts.compile_expert(
      args.kind,
      variant=args.variant,
      batch_size=args.batch_size,
      topology=args.topology,
    )
  return experts.bench_expert(
    args.kind,
    variant=args.variant,
    batch_size=args.batch_size,
    rounds=args.rounds,
    against=args.against,
    threads=args.threads,
  )


def _add_flops(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("flops", help="of each part of a train step")
  _add_config(parser)
  parser.add_argument("--batch-size", type=_positive, default=64)
  parser.add_argument(
    "--compile", choices=("no", "whole"), default="no", help="ask XLA too"
  )
  parser.set_defaults(run=_flops)


def _flops(args: argparse.Namespace) -> object:
  from mtv_jax.config import schema
  from mtv_jax.perf.bench import flops

  return flops.bench_flops(
    schema.read_config(args.config),
    batch_size=args.batch_size,
    compile=args.compile,
  )


def _profiled(folder: str | None) -> contextlib.AbstractContextManager:
  if folder is None:
    # Without loading JAX, which the input pipeline does not need.
    return contextlib.nullcontext()
  import jax

  return jax.profiler.trace(folder)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  _add_data(commands)
  _add_step(commands)
  _add_views(commands)
  _add_eval(commands)
  _add_checkpoint(commands)
  _add_flops(commands)
  _add_against(commands)
  _add_experts(commands)
  for command in commands.choices.values():
    command.add_argument("--json", type=Path, help="also write the result here")
    command.add_argument("--profile", metavar="DIR", help="also write a trace")
  args = parser.parse_args(argv)
  with errors.readable_errors("bench"):
    with _profiled(args.profile):
      speed = args.run(args)
    print(speed)
    if args.json:
      args.json.write_text(speed.to_json() + "\n")


if __name__ == "__main__":
  main()
