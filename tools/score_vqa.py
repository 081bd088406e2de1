"""`mtv-jax score_vqa`: score answers to questions about images."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("score_vqa"))
