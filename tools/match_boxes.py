"""`mtv-jax match_boxes`: compare an expert's boxes with annotations."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("match_boxes"))
