"""The command line of one classification probe: `knn`, `linear_probe`."""

from __future__ import annotations

import argparse

import jax

from mtv_jax.cli import arguments
from mtv_jax.encoder import loading
from mtv_jax.evals import run as evals
from mtv_jax.evals.core import results as results_lib
from mtv_jax.evals.report import tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of a probe."""
  add = parser.add_argument
  add("--encoder", required=True, help="folder to load, or pixels:64")
  add("--weights", default="student", help="student, teacher or ema")
  add("--data", default="scenes", help="with a training and a test split")
  add("--train", help="training images, where --data does not have them")
  add("--set", action="append", default=[], metavar="OPTION=VALUE")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--json", help="file to write")
  arguments.add_distributed(parser)


def run(name: str, args: argparse.Namespace) -> None:
  """Runs the evaluation of that name."""
  arguments.initialize_distributed(args)
  entries = evals.plan(
    [name],
    data=[args.data],
    options={"train": args.train},
    assignments=[f"{name}.{option}" for option in args.set],
  ).entries
  encoder = loading.load(args.encoder, weights=args.weights, dtype=args.dtype)
  results = evals.evaluate(encoder, entries)
  if not jax.process_index():
    print(tables.format_encoder(results))
    if args.json:
      results_lib.write_json(args.json, encoder, results)
