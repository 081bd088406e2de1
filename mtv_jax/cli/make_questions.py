"""Writes questions about built-in scenes and their images, as LLaVA's JSON.

    mtv-jax make_questions --output=questions --count=20000 --size=48

OUTPUT/questions.json is data for `configs/llava.py`, and for the evaluation
`vqa`. The default scenes are those of probes, which neither pretraining nor
evaluations see.
"""

import collections
import json
import pathlib
from typing import Literal

from mtv_jax.data.scenes import questions, render
from mtv_jax.data.scenes.layout import DIFFICULTIES
from mtv_jax.evals.datasets.scenes import PROBE_SCENES
from mtv_jax.utils import atomic, plots
from mtv_jax.utils.threads import map_ahead


def run(
  output: str,
  *,
  first: int = PROBE_SCENES,
  count: int = 10_000,
  size: int = 96,
  seed: int = 0,
  difficulty: Literal[tuple(DIFFICULTIES)] = "hard",
) -> None:
  """Writes the questions.

  Args:
    output: folder to write.
    first: index of the first scene.
    count: number of scenes.
    size: side of a scene, in pixels.
    seed: seed of the scenes.
    difficulty: difficulty of the scenes.
  """
  folder = pathlib.Path(output)
  (folder / "images").mkdir(parents=True, exist_ok=True)
  numbers = range(first, first + count)
  asked = questions.balanced_questions(numbers, seed, difficulty)

  def write(number: int) -> None:
    options = {"size": size, "seed": seed, "difficulty": difficulty}
    image = render.render(number, **options).image
    plots.save_image(image, folder / "images" / f"{number}.png")

  for _ in map_ahead(write, sorted({q.number for q in asked})):
    pass
  rows = [
    questions.conversation(
      q.text,
      q.answer,
      f"images/{q.number}.png",
      id=f"{q.number}-{q.kind}",
      answer_type=q.kind,
    )
    for q in asked
  ]
  atomic.write_text(folder / "questions.json", json.dumps(rows) + "\n")
  kinds = collections.Counter(q.kind for q in asked)
  print(f"wrote {len(rows)} questions to {folder}: {dict(kinds)}")
