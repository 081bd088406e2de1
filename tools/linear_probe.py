"""Linear classification on an encoder's features, as DINOv2 measures it.

    python tools/linear_probe.py --encoder=runs/a
    python tools/linear_probe.py --encoder=runs/a --data=imagenet \\
      --set=batch_size=512 --json=linear.json
    python tools/linear_probe.py --encoder=runs/a --data=imagenet \\
      --set=augment=cached --set=select=train_split

The data are scenes or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
Published figures are trained on random crops, which are encoded anew at every
step; with augment=cached features are computed once.
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
  add("--encoder", required=True, help="folder to load, or pixels:64")
  add("--weights", default="student", help="student, teacher or ema")
  add("--data", default="scenes", help="with a training and a test split")
  add("--train", help="images to train on, where --data does not have them")
  add("--set", action="append", default=[], metavar="OPTION=VALUE")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--json", help="file to write")
  add("--distributed", action="store_true", help="join the hosts of a pod")
  args = parser.parse_args(argv)
  if args.distributed:
    jax.distributed.initialize()
  try:
    entries = run.plan(
      ["linear_probe"],
      data=[args.data],
      options={"train": args.train},
      assignments=[f"linear_probe.{option}" for option in args.set],
    ).entries
    encoder = mtv_jax.load(args.encoder, weights=args.weights, dtype=args.dtype)
    results = run.evaluate(encoder, entries)
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f"linear_probe: {error}") from error
  if not jax.process_index():
    print(run.table(results))
    if args.json:
      run.write_json(args.json, encoder, results)


if __name__ == "__main__":
  main()
