"""`mtv-jax knn`: k-NN classification."""

import sys

from mtv_jax.cli.main import command

main = command("knn")

if __name__ == "__main__":
  sys.exit(main())
