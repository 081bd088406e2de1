"""`mtv-jax match_boxes`: compare an expert's boxes with annotations."""

import sys

from mtv_jax.cli.main import command

main = command("match_boxes")

if __name__ == "__main__":
  sys.exit(main())
