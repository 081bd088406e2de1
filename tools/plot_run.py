"""Draws a run's figures over its steps.

python tools/plot_run.py runs/a --out=losses.svg
python tools/plot_run.py runs/a --names='^depth/|_r1$' --out=depth.png
"""

import argparse
from collections.abc import Sequence

from mtv_jax.cli import errors
from mtv_jax.utils import curves


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", help="the run's folder")
  parser.add_argument("--out", required=True, help=".svg, .png or .pdf")
  parser.add_argument(
    "--names", default=r"/loss$", help="regex of figures; by default losses"
  )
  args = parser.parse_args(argv)
  with errors.readable_errors("plot_run"):
    series = curves.read_metrics(args.run)
    curves.plot_metrics(series, args.names).savefig(args.out)
  print(f"drawn: {args.out}")


if __name__ == "__main__":
  main()
