"""`python -m mtv_jax.main --config=... --workdir=...`: `mtv-jax train`."""

import sys

from mtv_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main(["train", *sys.argv[1:]]))
