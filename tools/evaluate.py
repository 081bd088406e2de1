"""Evaluates an encoder: a run, an export or a Hugging Face folder.

    python tools/evaluate.py --encoder=runs/a --evals=zero_shot,retrieval
    python tools/evaluate.py --encoder=siglip-base-patch16-224 \\
      --evals=retrieval --data=coco/annotations/captions_val2017.json
    python tools/evaluate.py --encoder=runs/a --evals=all \\
      --data=zero_shot=imagenet/val --prompts=imagenet.json \\
      --data=retrieval=coco/dataset_coco.json --json=out.json
"""

import argparse
from collections.abc import Sequence

import jax

import mtv_jax
from mtv_jax.evals import run


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line; errors end the program with their message."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--encoder", required=True, help="folder to load")
  add("--weights", default="student", help="student, teacher or ema")
  add("--evals", default="all", help="names with commas between, or all")
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
  add("--batch_size", type=int, help="images a step, over all devices")
  add(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="of the computation",
  )
  add("--json", help="file to write")
  add(
    "--distributed",
    action="store_true",
    help="join the other hosts of a pod; each runs this same command",
  )
  args = parser.parse_args(argv)

  if args.distributed:
    jax.distributed.initialize()
  try:
    evaluate(args)
  except (ValueError, OSError, ImportError) as error:
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    raise SystemExit(f"evaluate: {error}{notes}") from error


def evaluate(args: argparse.Namespace) -> None:
  """Loads, evaluates, prints and writes."""
  options = ("images", "prompts", "classes", "split", "count", "batch_size")
  evals = run.configs(
    args.evals.split(","),
    data=args.data or ["scenes"],
    options={name: getattr(args, name) for name in options},
  )
  encoder = mtv_jax.load(args.encoder, weights=args.weights, dtype=args.dtype)
  results = run.evaluate(encoder, evals)
  if jax.process_index():
    return
  print(run.table(results))
  if args.json:
    run.write_json(args.json, encoder, results)


if __name__ == "__main__":
  main()
