"""`mtv-jax score_vqa`: score answers to questions about images."""

import sys

from mtv_jax.cli.main import command

main = command("score_vqa")

if __name__ == "__main__":
  sys.exit(main())
