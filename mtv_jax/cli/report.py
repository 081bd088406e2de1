"""Reports runs or studies on one page: metrics, curves, images, differences.

mtv-jax report runs/a --output=runs/a
mtv-jax report runs/a runs/b --output=reports/a_b
mtv-jax report runs/a --output=reports/a --names='^depth/|grad_norm'
mtv-jax report studies/ladder --output=docs/study/ladder
mtv-jax report studies/flops_1 studies/flops_2 --output=reports/flops

Writes a self-contained `report.html`, `report.md` with its images, and one
figure per metric as `charts/*.svg`.
"""

import pathlib
import tempfile
from collections.abc import Sequence

from mtv_jax.cli import arguments
from mtv_jax.report import runs as run_pages
from mtv_jax.studies import budgets, page, runner
from mtv_jax.train import workdir
from mtv_jax.utils.errors import ConfigError


def run(
  runs: Sequence[str], /, *, output: str, names: str | None = None
) -> None:
  """Writes the report.

  Args:
    runs: runs' folders, or the folders of studies: one, or several that differ
      in `--budget`.
    output: folder of the report.
    names: regex of logged metrics to draw beside losses and evaluations.
  """
  arguments.check_writable(output)
  with tempfile.TemporaryDirectory() as temporary:
    folders = [
      workdir.copy_run(run, pathlib.Path(temporary) / f"{i}")
      for i, run in enumerate(runs)
    ]
    if all((folder / runner.STUDY).exists() for folder in folders):
      if names is not None:
        raise ConfigError("--names applies to runs, not to a study.")
      if len(folders) == 1:
        paths = page.write_study(folders[0], output)
      else:
        paths = budgets.write_budgets(folders, output)
    else:
      paths = run_pages.write_runs(folders, output, names=names)
  for path in paths:
    print(f"wrote {path}")
