"""`mtv-jax label`: label shards with an expert model."""

import sys

from mtv_jax.cli.main import command

main = command("label")

if __name__ == "__main__":
  sys.exit(main())
