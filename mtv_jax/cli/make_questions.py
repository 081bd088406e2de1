"""Writes questions about scenes or labelled boxes, with images, as LLaVA JSON.

    mtv-jax make_questions --output=train --count=20000 --size=48 --merge
    mtv-jax make_questions --output=test --split=test --count=1000 --size=48
    mtv-jax make_questions --output=photos --data=shards/{00..09}.tar \\
      --labels=boxes

Train on OUTPUT/questions.json with `configs/llava.py`; run the evaluation `vqa`
on questions about other scenes or shards. Pretraining sees neither the training
scenes, on which probes train too, nor the held-out test scenes.
"""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mtv_jax.data.scenes.layout import DIFFICULTIES
from mtv_jax.data.scenes.questions import KINDS, conversation
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.questions import DEFAULT_SCENES
from mtv_jax.evals.datasets.scenes import HELD_OUT_SCENES, PROBE_SCENES
from mtv_jax.utils import atomic, plots
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.threads import map_ahead

_SPLITS = {"train": PROBE_SCENES, "test": HELD_OUT_SCENES}  # First scenes.
_SPLIT_SIZE = PROBE_SCENES - HELD_OUT_SCENES


def run(
  output: str,
  *,
  data: str = "scenes",
  labels: str | None = None,
  count: int | None = None,
  split: Literal[tuple(_SPLITS)] = "train",
  first: int = 0,
  size: int = 96,
  seed: int = 0,
  difficulty: Literal[tuple(DIFFICULTIES)] = "hard",
  merge: bool = False,
  kinds: Sequence[str] = (),
) -> None:
  """Writes the questions.

  Args:
    output: folder to write, without existing questions.
    data: scenes, COCO's folder, shards, or LLaVA's JSON.
    labels: label set of the shards' boxes.
    count: number of images; default: all, or 500 scenes.
    split: scenes for training, or held-out scenes for testing.
    first: index of the first scene in the split.
    size: side of a scene, in pixels.
    seed: seed of the scenes.
    difficulty: difficulty of the scenes.
    merge: write one conversation per image with all its questions, in random
      order, as LLaVA-1.5 trains; `vqa` takes only separate questions.
    kinds: types of questions to write; for scenes also semantic and spatial.
  """
  folder = pathlib.Path(output)
  if (folder / "questions.json").exists():
    raise InputError(f"{folder} already has questions; name another --output.")
  data_entry = data
  if data == "scenes":
    end = first + (count or DEFAULT_SCENES)
    if end > _SPLIT_SIZE:
      raise InputError(
        f"Scenes {first} to {end - 1} exceed a split's {_SPLIT_SIZE:,} scenes;"
        " change --first or --count."
      )
    scene = {"size": size, "seed": seed, "difficulty": difficulty}
    data_entry = {"type": data, "first": _SPLITS[split] + first, **scene}
  elif labels:
    data_entry = {"path": data, "labels": {"boxes": labels}}
  question_set = registry.open_questions(data_entry, split="train", count=count)
  if question_set.prompt:  # Only benchmarks have a prompt.
    raise InputError(f"--data={data} is a benchmark: `vqa` reads it as it is.")
  types = [truth.kind or "other" for truth in question_set.truths]
  types_by_kind = {
    name: {*KINDS.get(name, (name,))} & {*types} for name in kinds
  }
  if unknown := [name for name, group in types_by_kind.items() if not group]:
    raise InputError(f"--kinds={unknown}: expected some of {sorted({*types})}.")
  chosen_types = set().union(*types_by_kind.values()) if kinds else {*types}
  indices = [i for i, kind in enumerate(types) if kind in chosen_types]
  truths = [question_set.truths[i] for i in indices]
  pairs = [
    (question_set.texts[i], question_set.truths[i].truths[0]) for i in indices
  ]
  images = [int(question_set.owner[i]) for i in indices]
  keys = [question_set.keys[i] for i in indices]
  files = [f"images/{image}.png" for image in images]
  (folder / "images").mkdir(parents=True, exist_ok=True)

  def write_image(i: int) -> None:
    plots.save_image(question_set.images[i], folder / "images" / f"{i}.png")

  collections.deque(map_ahead(write_image, sorted({*images})), maxlen=0)
  if merge:
    merged = collections.defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(pairs)):
      merged[files[i]].append(pairs[i])
    rows = [
      conversation(group, file, id=file) for file, group in merged.items()
    ]
  else:
    rows = [
      conversation([pair], file, id=key, answer_type=truth.kind)
      for pair, file, key, truth in zip(pairs, files, keys, truths, strict=True)
    ]
  atomic.write_text(folder / "questions.json", json.dumps(rows) + "\n")
  counts = collections.Counter(truth.kind for truth in truths)
  print(f"wrote {len(truths)} questions to {folder}: {dict(counts)}")
