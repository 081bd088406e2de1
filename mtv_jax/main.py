"""`python -m mtv_jax.main --config=... --workdir=...`: `mtv-jax train`."""

import sys

from mtv_jax.cli.main import end_at_interrupt, main

if __name__ == "__main__":
  with end_at_interrupt():
    sys.exit(main(["train", *sys.argv[1:]]))
