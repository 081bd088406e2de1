"""`mtv-jax convert`: convert to and from Hugging Face and big_vision."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("convert"))
