"""Measures what continued encoders keep: k-NN and neighbours, paired.

Compares runs with their start on labelled images (`train/CLASS/`, `val/CLASS/`)
by the pooled vector and by the mean patch after a block. SHARE is the share of
the run's weights in an interpolation with the start's (WiSE-FT, Wortsman et al.
2022), 1 for the run itself. Runs of one name are seeds, whose mean has a t
interval over them; other intervals are over images:

  python tools/retention.py START IMAGES naive=runs/naive:student:1 \
    wise=runs/naive:student:0.5
"""

import argparse
import collections
import functools
from collections.abc import Iterator

import jax
import numpy as np
import scipy.stats

from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import mean_patches, normalize
from mtv_jax.evals import drift
from mtv_jax.evals.classification import knn
from mtv_jax.evals.core.examples import Splits, select_images
from mtv_jax.evals.datasets import registry


def interpolate(start: jax.Array, run: np.ndarray, *, share: float):
  """`start` for share 0, `run` for 1."""
  return start + share * (run - start)


def embed(encoder: Encoder, images, block: int) -> list[np.ndarray]:
  """Pooled vectors and mean patches after a block, `[n, d]` each."""
  indices = range(len(images))
  options = dict(outputs=("pooled",), layers=(block - 1,), batch_size=32)
  out = encoder.image(select_images(images, indices), **options)
  return [out.pooled, mean_patches(out.layers[block - 1], out.grids)]


def measure(encoder: Encoder, data: Splits, block: int) -> Iterator[tuple]:
  """Validation features and whether k-NN (k = 20) is right, by feature."""
  splits = data.train, data.test
  banks = [embed(encoder, split.images, block) for split in splits]
  for bank, queries in zip(*banks, strict=True):
    near = knn.find_neighbours(normalize(queries), normalize(bank), k=20)
    options = {"ks": [20], "classes": data.classes, "temperature": 0.07}
    predicted = knn.predict(near, data.train.labels, **options)[20]
    yield queries, (predicted == data.test.labels).astype(np.float64)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("start")
  parser.add_argument("images")
  parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER:WEIGHTS:SHARE")
  parser.add_argument("--block", type=int, default=9, help="counted from 1")
  args = parser.parse_args()
  data = registry.open_splits(args.images)
  encoder = loading.load(args.start)
  start = encoder.params["image"]
  first = [*measure(encoder, data, args.block)]
  kinds = "pooled", f"block {args.block}"
  for kind, (_, hits) in zip(kinds, first, strict=True):
    print(f"{'start':20} {kind:8} k-NN {100 * hits.mean():.1f}")
  seeds = collections.defaultdict(list)
  for text in args.runs:
    name, _, run = text.partition("=")
    folder, weights, share = run.rsplit(":", 2)
    image = loading.read_model(folder, weights=weights).params["image"]
    image = {key: image[key] for key in start}  # Without a mask token.
    mix = functools.partial(interpolate, share=float(share))
    image = jax.tree.map(mix, start, image)
    encoder.params = {**encoder.params, "image": image}
    after = measure(encoder, data, args.block)
    for kind, old, new in zip(kinds, first, after, strict=True):
      change = 100 * (new[1] - old[1])
      half = 1.96 * change.std(ddof=1) / len(change) ** 0.5
      agree = drift.neighbour_agreement(new[0], old[0], 10).mean()
      line = f"{name:20} {kind:8} k-NN {100 * new[1].mean():.1f}"
      line += f", {change.mean():+.1f} +- {half:.1f}, neighbours {agree:.3f}"
      print(line, flush=True)
      seeds[name, kind].append(change.mean())
  for (name, kind), means in seeds.items():
    if (n := len(means)) > 1:
      half = scipy.stats.t.ppf(0.975, n - 1) * np.std(means, ddof=1) / n**0.5
      print(f"{name:20} {kind:8} {np.mean(means):+.1f} +- {half:.1f}, {n} runs")


if __name__ == "__main__":
  main()
