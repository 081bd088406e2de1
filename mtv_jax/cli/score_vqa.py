"""Scores a file of answers to questions about images.

    mtv-jax score_vqa --rule=vqa --answers=answers.json \\
      --truths=v2_mscoco_val2014_annotations.json
    mtv-jax score_vqa --rule=pope --answers=answers.jsonl \\
      --truths=coco_pope_random.json --json=scores.json

Rules: vqa (VQAv2, TextVQA, OK-VQA), vqa_simple (without leaving one out),
exact (GQA), option (ScienceQA, MMBench), pope, anls (DocVQA).
"""

import argparse
import dataclasses
import json

from mtv_jax.evals import vqa
from mtv_jax.evals.report import tables
from mtv_jax.utils import atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax score_vqa`."""
  add = parser.add_argument
  add("--rule", required=True, choices=list(vqa.RULES))
  add("--answers", required=True, help="JSON, or one object per line")
  add("--truths", required=True, help="the benchmark's own file")
  add(
    "--missing",
    default="error",
    choices=("error", "wrong"),
    help="how questions without an answer count",
  )
  add("--json", help="file to write")


def run(args: argparse.Namespace) -> None:
  """Scores the answers and prints the metrics."""
  scores = vqa.score(
    vqa.read_answers(args.answers),
    vqa.read_questions(args.truths),
    rule=args.rule,
    missing=args.missing,
  )
  for name, value in scores.metrics.items():
    error = scores.errors.get(name)
    error = None if error is None else 100 * error
    print(f"{name:<24}{tables.format_value(100 * value, '%', error):>16}")
  for name, value in scores.protocol.items():
    print(f"  {name}: {value}")
  if args.json:
    text = json.dumps(dataclasses.asdict(scores), indent=2) + "\n"
    atomic.write_text(args.json, text)
