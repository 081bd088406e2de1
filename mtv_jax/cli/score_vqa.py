"""Scores a file of visual question answering (VQA) answers.

    mtv-jax score_vqa --rule=vqa --answers=answers.json \\
      --truths=v2_mscoco_val2014_annotations.json
    mtv-jax score_vqa --rule=pope --answers=answers.jsonl \\
      --truths=coco_pope_random.json --json=scores.json

Rules: vqa (VQAv2, OK-VQA), vqa_simple (no leave-one-out), textvqa,
exact (GQA), option (ScienceQA, MMBench), pope, anls (DocVQA).
"""

import dataclasses
import json as json_lib
from typing import Literal

from mtv_jax.evals import vqa
from mtv_jax.report import tables
from mtv_jax.utils import atomic


def run(
  rule: Literal[tuple(vqa.RULES)],
  answers: str,
  truths: str,
  missing: Literal["error", "wrong"] = "error",
  json: str | None = None,
) -> None:
  """Scores the answers and prints the metrics.

  Args:
    rule: scoring rule, see above.
    answers: JSON or JSON lines.
    truths: the benchmark's annotation file.
    missing: count missing answers as wrong, or exit with an error.
    json: also write the scores to this file.
  """
  predictions = vqa.read_answers(answers)
  questions = vqa.read_questions(truths)
  scores = vqa.score(predictions, questions, rule=rule, missing=missing)
  for name, value in scores.metrics.items():
    error = scores.errors.get(name)
    error = error and 100 * error
    print(f"{name:<24}{tables.format_value(100 * value, '%', error):>16}")
  for name, value in scores.protocol.items():
    print(f"  {name}: {value}")
  if json:
    text = json_lib.dumps(dataclasses.asdict(scores), indent=2) + "\n"
    atomic.write_text(json, text)
