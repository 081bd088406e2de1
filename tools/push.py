"""`mtv-jax push`: upload an export to the Hugging Face hub."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("push"))
