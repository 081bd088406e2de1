"""Writes ImageNet's class names and prompt templates to a JSON file.

    python tools/make_prompts.py --output=imagenet.json

The strings come from an installed open_clip, so that a zero-shot figure uses
exactly those of the published ones.
"""

import argparse
from collections.abc import Sequence

from mtv_jax.cli import errors
from mtv_jax.evals.core import prompts


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--output", required=True, help="the file to write")
  args = parser.parse_args(argv)
  with errors.readable_errors("make_prompts"):
    made = prompts.imagenet_prompts()
    prompts.write_prompts(args.output, made)
  print(
    f"{args.output}: {len(made.classes)} classes, {len(made.templates)} "
    "templates"
  )


if __name__ == "__main__":
  main()
