"""The command line of one evaluation that trains on a split of its data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from mtv_jax.cli import errors
from mtv_jax.encoder import loading
from mtv_jax.evals import run
from mtv_jax.evals.report import tables


def main(name: str, doc: str, argv: Sequence[str] | None = None) -> None:
  """Runs it; errors end the program with their message.

  Args:
    name: of the evaluation.
    doc: what `--help` says.
    argv: by default the program's own.
  """
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--encoder", required=True, help="folder to load, or pixels:64")
  add("--weights", default="student", help="student, teacher or ema")
  add("--data", default="scenes", help="with a training and a test split")
  add("--train", help="images to learn from, where --data does not have them")
  add("--set", action="append", default=[], metavar="OPTION=VALUE")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--json", help="file to write")
  add("--distributed", action="store_true", help="join the hosts of a pod")
  args = parser.parse_args(argv)
  if args.distributed:
    jax.distributed.initialize()
  with errors.readable_errors(name):
    entries = run.plan(
      [name],
      data=[args.data],
      options={"train": args.train},
      assignments=[f"{name}.{option}" for option in args.set],
    ).entries
    encoder = loading.load(args.encoder, weights=args.weights, dtype=args.dtype)
    results = run.evaluate(encoder, entries)
  if not jax.process_index():
    print(tables.format_encoder(results))
    if args.json:
      run.write_json(args.json, encoder, results)
