"""Puts runs on one page: metrics, curves, images, what differs.

mtv-jax report runs/a --output=runs/a
mtv-jax report runs/a runs/b --output=reports/a_b

The folder receives `report.html`, which needs no other file, and the same as
`report.md` with its images.
"""

import argparse

from mtv_jax.studies import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax report`."""
  parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
  parser.add_argument("--output", required=True, help="folder of the report")


def run(args: argparse.Namespace) -> None:
  """Writes the report."""
  for path in report.write_runs(args.runs, args.output):
    print(f"wrote {path}")
