"""`mtv-jax make_questions`: write questions about built-in scenes."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("make_questions"))
