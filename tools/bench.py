"""Measures speed on this machine, each thing beside its floor.

  python tools/bench.py data --data='cc3m/*.tar' --tokenizer=spiece.model
  python tools/bench.py step --config=configs/siglip_b16_224.py:tiny
  python tools/bench.py flops --config=configs/mtv_b16_224.py --compile=whole

`data` prints images a second for the input pipeline (tars to batches) beside
OpenCV decoding and resizing the same images, in the same run. `step` prints the
median time of a config's train step, alone and behind its input pipeline.
`flops` prints what each encoding and head of a step costs, and what one step
costs against a run for each objective; it computes nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mtv_jax import endings


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
  return value


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
  from mtv_jax.benchmarks import data

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
  parser.add_argument(
    "--config", required=True, help="a file, with its arguments after a colon"
  )
  parser.add_argument("--steps", type=_positive, default=20, help="to time")
  parser.set_defaults(run=_step)


def _step(args: argparse.Namespace) -> object:
  from mtv_jax import config
  from mtv_jax.benchmarks import step

  return step.bench_step(config.read(args.config), steps=args.steps)


def _add_flops(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser("flops", help="of each part of a train step")
  parser.add_argument(
    "--config", required=True, help="a file, with its arguments after a colon"
  )
  parser.add_argument("--batch-size", type=_positive, default=64)
  parser.add_argument(
    "--compile", choices=("no", "whole"), default="no", help="ask XLA too"
  )
  parser.set_defaults(run=_flops)


def _flops(args: argparse.Namespace) -> object:
  from mtv_jax import config
  from mtv_jax.benchmarks import flops

  return flops.bench_flops(
    config.read(args.config), batch_size=args.batch_size, compile=args.compile
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  _add_data(commands)
  _add_step(commands)
  _add_flops(commands)
  for command in commands.choices.values():
    command.add_argument("--json", type=Path, help="also write the result here")
  args = parser.parse_args(argv)
  with endings.readable_errors("bench"):
    speed = args.run(args)
    print(speed)
    if args.json:
      args.json.write_text(speed.to_json() + "\n")


if __name__ == "__main__":
  main()
