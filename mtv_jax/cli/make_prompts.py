"""Writes ImageNet's class names and prompt templates to a JSON file.

    mtv-jax make_prompts --output=imagenet.json

The strings come from an installed open_clip, which published zero-shot figures
use.
"""

import argparse

from mtv_jax.evals.core import prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax make_prompts`."""
  parser.add_argument("--output", required=True, help="the file to write")


def run(args: argparse.Namespace) -> None:
  """Writes the file."""
  imagenet = prompts.imagenet_prompts()
  prompts.write_prompts(args.output, imagenet)
  print(
    f"{args.output}: {len(imagenet.classes)} classes, "
    f"{len(imagenet.templates)} templates"
  )
