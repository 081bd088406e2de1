"""`mtv-jax show_scenes`: draw built-in scenes with their labels."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("show_scenes"))
