"""`mtv-jax inspect_labels`: sheet, page and statistics of label sets."""

import sys

from mtv_jax.cli.main import command

main = command("inspect_labels")

if __name__ == "__main__":
  sys.exit(main())
