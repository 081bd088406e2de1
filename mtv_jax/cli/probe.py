"""k-NN and linear probing of frozen features with DINOv2's protocols.

    mtv-jax knn --encoder=runs/a
    mtv-jax knn --encoder=runs/a --data=imagenet --json=knn.json \\
      --set=batch_size=512 --set=k='(10, 20)'
    mtv-jax linear_probe --encoder=runs/a --data=imagenet \\
      --set=batch_size=512 --json=linear.json
    mtv-jax linear_probe --encoder=runs/a --data=imagenet \\
      --set=augment=cached --set=select=train_split

--data is scenes or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg. The
published linear_probe protocol encodes new random crops at every step;
augment=cached computes the features once. `mtv-jax evaluate` runs all
evaluations.
"""

import functools

import jax

from mtv_jax.cli import arguments
from mtv_jax.encoder import loading
from mtv_jax.evals import run as evals
from mtv_jax.evals.core import results as results_lib
from mtv_jax.report import tables


class Flags(arguments.WeightFlags, arguments.DistributedFlags):
  """Flags of a probe.

  Args:
    encoder: folder to load, or pixels:64.
    data: data set with a training and a test split.
    train: training images, if --data lacks them.
    set: evaluation option, OPTION=VALUE.
    json: also write the results to this file.
  """

  encoder: str
  data: str = "scenes"
  train: str | None = None
  set: list[str] = ()
  json: str | None = None


def _run(name: str, args: Flags) -> None:
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


run_knn = functools.partial(_run, "knn")
run_linear_probe = functools.partial(_run, "linear_probe")
