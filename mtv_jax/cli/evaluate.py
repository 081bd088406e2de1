"""Evaluates encoders: runs, exports, Hugging Face folders, baselines.

    mtv-jax evaluate --encoder=runs/a --evals=zero_shot,retrieval
    mtv-jax evaluate --encoder=runs/a --encoder=pixels:64 --evals=all \\
      --data=scenes --output=results/a
    mtv-jax evaluate --encoder=siglip-base-patch16-224 --evals=all \\
      --data=zero_shot=imagenet/val --set=zero_shot.prompts=imagenet.json \\
      --data=retrieval=coco/dataset_coco.json --set=retrieval.max_captions=5 \\
      --output=results/siglip --compare=results/a/results.json

With --output: results.json, results.md, charts, sheets of images, and a
self-contained report.html. --evals=all lists evaluations that an encoder does
not support as skipped.
"""

import argparse
import functools
import sys

import jax

import mtv_jax
from mtv_jax.cli import arguments
from mtv_jax.evals import run as evals
from mtv_jax.evals import suite
from mtv_jax.evals.core import base, results
from mtv_jax.evals.encoder_requests import parse_requests
from mtv_jax.evals.published import SIZES
from mtv_jax.report import evaluations, tables

_OPTIONS = {
  "images": (str, "folder of images, if it is not beside the JSON"),
  "prompts": (str, "class names and templates: JSON, text or a folder"),
  "templates": (str, "text file with a prompt template per line"),
  "classes": (str, "all (of the prompts), dataset, or present (in the data)"),
  "split": (str, "of Karpathy's JSON; test by default"),
  "count": (int, "images to use, evenly spaced; default all"),
  "batch_size": (int, "images per step, over all devices"),
  "pictures": (int, "items per sheet; 8 with --output, otherwise no sheets"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax evaluate`."""
  arguments.add_encoder(
    parser,
    action="append",
    help="folder to load, or a baseline (pixels:64, random:B/16@224); PATH@ema"
    " selects the weights, NAME=PATH its name in tables; may be repeated, a"
    " column each",
  )
  add_evaluations(parser)
  add = parser.add_argument
  add("--output", help="folder for tables, sheets and the page")
  add("--compare", help="earlier results.json files, separated by commas")
  add("--json", help="file to write")
  arguments.add_distributed(parser)


def add_evaluations(parser: argparse.ArgumentParser) -> None:
  """The options that choose evaluations and data, and --reference."""
  parser.epilog = f"evaluations: {', '.join(base.EVALUATORS)}"
  add = parser.add_argument
  add("--evals", default="all", help="names separated by commas, or all")
  add(
    "--data",
    action="append",
    help="scenes (the default), a folder of classes, COCO's or Karpathy's "
    "JSON, or tars; or NAME=DATA for one evaluation; may be repeated",
  )
  arguments.add_options(parser, _OPTIONS)
  arguments.add_set(
    parser,
    "NAME.OPTION=VALUE",
    "any option of an evaluation, as --set=retrieval.max_captions=5",
  )
  add(
    "--published",
    action="store_true",
    help="train probes for the whole published schedule; by default on few "
    "images for at most 100 passes over them, and on scenes for less",
  )
  add(
    "--reference",
    default="base",
    choices=(*SIZES, "none"),
    help="published encoders in the chart, for the same data sets",
  )


def read_plan(args: argparse.Namespace) -> evals.Plan:
  """The evaluations by the options of `add_evaluations`."""
  return evals.plan(
    args.evals.split(","),
    data=args.data or ["scenes"],
    options={name: getattr(args, name) for name in _OPTIONS}
    | {"published": args.published or None},
    preferences={"pictures": 8} if args.output else {},
    assignments=args.set,
  )


def run(args: argparse.Namespace) -> None:
  """Evaluates, prints and writes; SystemExit lists failed evaluations."""
  arguments.initialize_distributed(args)
  chosen = read_plan(args)
  if args.output:
    arguments.check_writable(args.output)
  earlier = args.compare.split(",") if args.compare else []
  compared = [outcome for path in earlier for outcome in results.read(path)]
  requests = parse_requests(args.encoder, weights=args.weights)
  encoders = {
    request.name: mtv_jax.load(
      request.path, weights=request.weights, dtype=args.dtype
    )
    for request in requests
  }
  log_fn = functools.partial(print, file=sys.stderr, flush=True)
  outcomes = suite.evaluate(
    encoders,
    chosen,
    checkpoints={request.name: request.checkpoint for request in requests},
    folder=args.output,
    log_fn=log_fn,
  )
  if jax.process_index() == 0:
    if any(outcome.results for outcome in outcomes):
      print(tables.format_results([*outcomes, *compared]))
    if args.json:
      results.write(args.json, outcomes)
    if args.output:
      size = None if args.reference == "none" else args.reference
      files = evaluations.write_evaluation(
        args.output, outcomes, compared=compared, size=size
      )
      print("\nWritten:", *files, sep="\n  ")
  if failed := suite.errors(outcomes, chosen):
    raise SystemExit("evaluate: " + "\n".join(failed))
