"""Evaluates encoders: runs, exports, Hugging Face folders, baselines.

    mtv-jax evaluate --encoder=runs/a --evals=zero_shot,retrieval
    mtv-jax evaluate --encoder=runs/a --encoder=pixels:64 --evals=all \\
      --data=scenes --output=results/a
    mtv-jax evaluate --encoder=siglip-base-patch16-224 --evals=all \\
      --data=zero_shot=imagenet/val --set=zero_shot.prompts=imagenet.json \\
      --data=retrieval=coco/dataset_coco.json --set=retrieval.max_captions=5 \\
      --output=results/siglip --compare=results/a/results.json

With --output: results.json, results.md, radar.png, sheets of images, and a
self-contained report.html. --evals=all lists evaluations that an encoder does
not support as skipped.
"""

import argparse
import sys

import jax

import mtv_jax
from mtv_jax.cli import arguments
from mtv_jax.evals import run as evals
from mtv_jax.evals import suite
from mtv_jax.evals.core import base, results
from mtv_jax.evals.report import references, tables

_OPTIONS = (
  "images",
  "prompts",
  "classes",
  "split",
  "count",
  "batch_size",
  "pictures",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax evaluate`."""
  parser.epilog = f"evaluations: {', '.join(base.EVALUATORS)}"
  add = parser.add_argument
  add(
    "--encoder",
    action="append",
    required=True,
    help="folder to load, or a baseline (pixels:64, random:B/16@224); PATH@ema"
    " selects the weights; may be repeated, a column each",
  )
  add("--weights", default="student", help="student, teacher or ema")
  add("--evals", default="all", help="names separated by commas, or all")
  add(
    "--data",
    action="append",
    help="scenes (the default), a folder of classes, COCO's or Karpathy's "
    "JSON, or tars; or NAME=DATA for one evaluation; may be repeated",
  )
  add("--images", help="folder of images, where it is not beside the JSON")
  add("--prompts", help="JSON of class names and templates")
  add("--classes", help="all (of the prompts), or present (in the data)")
  add("--split", help="of Karpathy's JSON; test by default")
  add("--count", type=int, help="images to use, evenly spaced; default all")
  add("--batch_size", type=int, help="images per step, over all devices")
  add(
    "--set",
    action="append",
    default=[],
    metavar="NAME.OPTION=VALUE",
    help="any option of an evaluation, as --set=retrieval.max_captions=5",
  )
  add(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="of the computation",
  )
  add("--output", help="folder for tables, sheets and the page")
  add(
    "--pictures",
    type=int,
    help="items per sheet; 8 with --output, otherwise no sheets",
  )
  add("--compare", help="earlier results.json files, separated by commas")
  add(
    "--reference",
    default="base",
    choices=(*references.SIZES, "none"),
    help="published encoders in the chart, where the data are theirs",
  )
  add("--json", help="file to write")
  arguments.add_distributed(parser)


def run(args: argparse.Namespace) -> None:
  """Evaluates; SystemExit lists the evaluations that failed."""
  arguments.initialize_distributed(args)
  failed = evaluate(args)
  if failed:
    raise SystemExit("evaluate: " + "\n".join(failed))


def evaluate(args: argparse.Namespace) -> list[str]:
  """Loads, evaluates, prints and writes; returns the errors."""
  chosen = evals.plan(
    args.evals.split(","),
    data=args.data or ["scenes"],
    options={name: getattr(args, name) for name in _OPTIONS},
    preferences={"pictures": 8} if args.output else {},
    assignments=args.set,
  )
  earlier = args.compare.split(",") if args.compare else []
  compared = [outcome for path in earlier for outcome in results.read(path)]
  encoders = {
    asked.name: mtv_jax.load(
      asked.path, weights=asked.weights, dtype=args.dtype
    )
    for asked in suite.parse_requests(args.encoder, weights=args.weights)
  }
  outcomes = suite.evaluate(encoders, chosen, folder=args.output, say=_say)
  failed = suite.errors(outcomes, chosen)
  if jax.process_index():
    return failed
  if any(outcome.results for outcome in outcomes):
    print(tables.format_results([*outcomes, *compared]))
  if args.json:
    results.write(args.json, outcomes)
  if args.output:
    size = None if args.reference == "none" else args.reference
    files = suite.write(args.output, outcomes, compared=compared, size=size)
    print("\nWritten:", *files, sep="\n  ")
  return failed


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
