"""`mtv-jax make_prompts`: write ImageNet's class names and prompts."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("make_prompts"))
