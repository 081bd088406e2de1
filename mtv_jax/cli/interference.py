"""Compares the objectives' gradients at a run's checkpoints, over many batches.

  mtv-jax interference runs/a
  mtv-jax interference runs/a --steps 100 1000 2000 --batches=512

Measures the reliability of each objective's gradient on the image encoder, the
cosines of expected gradients, and the change of each loss along them, with
controls. Writes interference/STEP.json into the run's folder, which
`mtv-jax report` draws; rerunning the command skips measured steps. If the run
has no checkpoints, it prints the stored measurements.
"""

from collections.abc import Sequence
from typing import Annotated

from mtv_jax.report import page
from mtv_jax.report.interference import describe_measurement
from mtv_jax.studies import interference
from mtv_jax.train.metrics import setup_logging


def run(
  workdir: str,
  /,
  *,
  steps: Sequence[int] = (),
  batches: int = 256,
  reliability: float = 0.5,
  transfer: Annotated[int, 0] = 16,
  length: float | None = None,
  set: list[str] = (),
) -> None:
  """Measures checkpoints and prints tables.

  Args:
    workdir: the run's folder.
    steps: checkpoints to measure; default: the nearest to 10 %, 50 % and 100 %
      of the last checkpoint's step; without checkpoints all measured steps.
    batches: maximum number of batches; fewer if all gradients are reliable.
    reliability: reliability of a gradient's mean over half of the batches at
      which the objective needs no more batches.
    transfer: number of batches on which changes of losses are measured.
    length: length of a step, relative to the encoder's parameters; default:
      the highest learning rate of the run.
    set: KEY=VALUE; same effect as --config.KEY=VALUE.
  """
  setup_logging()
  settings = interference.Settings(batches, reliability, transfer, length)
  for measurement in interference.measure_run(workdir, steps, settings, set):
    print(f"Step {measurement['step']:,}\n")
    for block in describe_measurement(measurement):
      print(block.markdown(page.PageFiles()), end="\n\n")
