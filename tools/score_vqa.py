"""Scores a file of answers to questions about images.

    python tools/score_vqa.py --rule=vqa --answers=answers.json \\
      --truths=v2_mscoco_val2014_annotations.json
    python tools/score_vqa.py --rule=pope --answers=answers.jsonl \\
      --truths=coco_pope_random.json --json=scores.json

Rules: vqa (VQAv2, TextVQA, OK-VQA), vqa_simple (without leaving one out),
exact (GQA), option (ScienceQA, MMBench), pope, anls (DocVQA).
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

from mtv_jax.evals.vqa import answer_files


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line; errors end the program with their message."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--rule", required=True, choices=list(answer_files.RULES))
  add("--answers", required=True, help="JSON, or an object a line")
  add("--truths", required=True, help="the benchmark's own file")
  add(
    "--missing",
    default="error",
    choices=("error", "wrong"),
    help="what questions without an answer are",
  )
  add("--json", help="file to write")
  args = parser.parse_args(argv)

  try:
    scores = answer_files.score(
      answer_files.read_answers(args.answers),
      answer_files.read_questions(args.truths),
      rule=args.rule,
      missing=args.missing,
    )
  except (ValueError, OSError) as error:
    raise SystemExit(f"score_vqa: {error}") from error
  for name, value in scores.metrics.items():
    print(f"{name:<24}{100 * value:8.2f} %")
  for name, value in scores.protocol.items():
    print(f"  {name}: {value}")
  if args.json:
    text = json.dumps(dataclasses.asdict(scores), indent=2) + "\n"
    pathlib.Path(args.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
