"""`mtv-jax make_shards`: write shards of images and captions."""

import sys

from mtv_jax.cli.main import command

main = command("make_shards")

if __name__ == "__main__":
  sys.exit(main())
