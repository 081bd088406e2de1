"""`mtv-jax preflight`: compile a config for a topology, without hardware."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("preflight"))
