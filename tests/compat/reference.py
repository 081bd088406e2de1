"""Figures of the fixtures that old and new code must agree on.

`python reference.py`, in the folder of the fixtures, writes `reference.npz`.
"""

import pathlib

import numpy as np

import mtv_jax
from mtv_jax.data import registry as sources

PHRASES = ["a red ball", "two blue boxes on grass"]
BOXES = [[(0.1, 0.2, 0.6, 0.9), (0, 0, 1, 1)], [], [(0.5, 0.25, 0.75, 0.5)]]
ENCODERS = {
  "all": ("all", "student"),
  "all_teacher": ("all", "teacher"),
  "all_ema": ("all", "ema"),
  "variant": ("variant", "student"),
  "exported": ("exported", "student"),
  "native": ("native", "student"),
}
LABELS = {
  "aligned": dict(depth="labels/depth", boxes="labels/boxes"),
  "keyed": dict(
    depth=dict(path="labels/depth", join="key"),
    boxes=dict(path="labels/boxes", join="key"),
  ),
}


def images(folder: pathlib.Path) -> list[bytes]:
  """The first images of the tars, as encoded bytes."""
  source = sources.build_source(
    dict(type="webdataset", path=f"{folder}/shards/*.tar")
  )
  return [source[i]["image"] for i in range(3)]


def encoder_figures(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
  """Features, text embeddings and predictions of an encoder."""
  path, weights = ENCODERS[name]
  encoder = mtv_jax.load(folder / path, weights=weights)
  shown = images(folder)
  features = encoder.image(shown, layers=(0, 1, -1))
  figures = {
    "pooled": features.pooled,
    "patches": features.patches,
    "prefix": features.prefix,
    **{f"layer{i}": x for i, x in features.layers.items()},
    **{f"prefix_layer{i}": x for i, x in features.prefix_layers.items()},
    "text": encoder.text(PHRASES),
  }
  figures["similarity"] = encoder.similarity(features.pooled, figures["text"])
  figures["depth"] = encoder.depth(shown)
  figures["regions"] = encoder.ground(shown, BOXES).embeddings
  if name == "variant":
    figures["boxes"] = encoder.locate(shown, [PHRASES, [], PHRASES[:1]]).boxes
  return figures


def label_figures(folder: pathlib.Path, join: str) -> dict[str, np.ndarray]:
  """What a source with label sets gives; a label that is missing is empty."""
  labels = {}
  for kind, entry in LABELS[join].items():
    if isinstance(entry, dict):
      labels[kind] = dict(entry, path=f"{folder}/{entry['path']}")
    else:
      labels[kind] = f"{folder}/{entry}"
  source = sources.build_source(
    dict(type="webdataset", path=f"{folder}/shards/*.tar", labels=labels)
  )
  figures = {}
  for i in range(len(source)):
    record = source[i]
    figures[f"{i}/key"] = np.array(record["key"])
    figures[f"{i}/captions"] = np.array(record["captions"])
    for field in ("depth", "boxes", "phrases", "box_scores"):
      if field in record:
        figures[f"{i}/{field}"] = np.asarray(record[field])
  return figures


def main() -> None:
  """Writes the figures of the current folder."""
  folder = pathlib.Path()
  figures = {
    f"labels/{k}": v for k, v in label_figures(folder, "aligned").items()
  }
  for name in ENCODERS:
    found = encoder_figures(folder, name)
    figures |= {f"{name}/{k}": v for k, v in found.items()}
  np.savez("reference.npz", **figures)


if __name__ == "__main__":
  main()
