"""Reports runs or a study on one page: metrics, curves, images, differences.

mtv-jax report runs/a --output=runs/a
mtv-jax report runs/a runs/b --output=reports/a_b
mtv-jax report runs/a --output=reports/a --names='^depth/|grad_norm'
mtv-jax report studies/ladder --output=docs/study/ladder

Writes a self-contained `report.html`, `report.md` with its images, and one
figure per metric as `charts/*.svg`.
"""

import argparse
import pathlib
import tempfile

from mtv_jax.cli import arguments
from mtv_jax.report import runs as run_pages
from mtv_jax.studies import page, runner
from mtv_jax.train import workdir
from mtv_jax.utils.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `mtv-jax report`."""
  text = "a run's folder, or the folder of one study"
  parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
  parser.add_argument("--output", required=True, help="folder of the report")
  text = "regex of logged metrics to draw beside losses and evaluations"
  parser.add_argument("--names", metavar="REGEX", help=text)


def run(args: argparse.Namespace) -> None:
  """Writes the report."""
  arguments.check_writable(args.output)
  with tempfile.TemporaryDirectory() as temporary:
    runs = [
      workdir.copy_run(run, pathlib.Path(temporary) / f"{i}")
      for i, run in enumerate(args.runs)
    ]
    if len(runs) == 1 and (runs[0] / runner.STUDY).exists():
      if args.names is not None:
        raise ConfigError("--names is an option of runs, not of a study.")
      paths = page.write_study(runs[0], args.output)
    else:
      paths = run_pages.write_runs(runs, args.output, names=args.names)
  for path in paths:
    print(f"wrote {path}")
