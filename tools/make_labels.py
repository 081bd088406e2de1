"""`mtv-jax make_labels`: write label sets from annotations."""

import sys

from mtv_jax.cli.main import command

main = command("make_labels")

if __name__ == "__main__":
  sys.exit(main())
