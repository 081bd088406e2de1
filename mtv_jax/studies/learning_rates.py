"""Losses over learning rates by model size, with muP and without.

With muP the rate of the lowest loss should not depend on width or depth (Yang
et al. 2021, arXiv 2203.03466, figure 1).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from mtv_jax.config import overrides
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.report import charts, page
from mtv_jax.studies import coordinates
from mtv_jax.train.experiment import make_loader
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import resolve
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.path import read_json
from mtv_jax.utils.text import file_name

FILE = "rates.json"


@dataclasses.dataclass(frozen=True)
class RateResult:
  """Loss of one model at one learning rate.

  Attributes:
    model: the arm's name.
    mup: whether the model has muP.
    seed: the run's seed.
    size: width or depth of the image tower, whichever differs.
    rate: `config.optim.lr`.
    loss: mean of the loss over the last tenth of the steps; None if it is not
      finite.
  """

  model: str
  mup: bool
  seed: int
  size: int
  rate: float
  loss: float | None


def compare_rates(
  rates: Sequence[float],
  config: ConfigDict,
  models: Sequence[str],
  output: pathlib.Path,
  *,
  steps: int,
  seeds: int | str = 1,
) -> list[pathlib.Path]:
  """Trains each model at each rate; writes `rates.json` and a page.

  `rates.json` is written after each training, and a further call continues from
  it if everything but the models, rates and seeds is equal. `models` are as for
  `scaling` studies. Either widths or depths must differ.
  """
  if not rates or not all(0 < rate < float("inf") for rate in rates):
    raise ConfigError("study rates: pass positive --rates, such as 1e-3 2e-3.")
  arms, field = coordinates.make_arms(config, models, steps=steps, seeds=seeds)
  data = dict(steps=steps, size=field, config=json.loads(config.to_json()))
  output.mkdir(parents=True, exist_ok=True)
  found = read_json(output / FILE) or {**data, "rows": []}
  if {**found, "rows": []} != {**data, "rows": []}:
    raise ConfigError(
      f"{output / FILE} has another config or number of steps: choose another "
      "--output."
    )
  rows = [RateResult(**row) for row in found["rows"]]
  for arm, rate in itertools.product(arms, dict.fromkeys(rates)):
    changed = overrides.override(config, (*arm.overrides, f"optim.lr={rate}"))
    run = resolve(changed)
    size = getattr(run.model.spec.image, field)
    name = arm.name.rpartition("-")[0]
    row = RateResult(name, run.model.has_mup, run.seed, size, rate, None)
    if row in [dataclasses.replace(done, loss=None) for done in rows]:
      continue
    rows.append(dataclasses.replace(row, loss=_train(changed, steps)))
    data["rows"] = [*map(dataclasses.asdict, rows)]
    atomic.write_text(output / FILE, json.dumps(data, indent=1) + "\n")
    label = "muP" if row.mup else "standard"
    print(f"{name} {label}, rate {rate}: {rows[-1].loss}", flush=True)
  blocks = _describe_page(rows, field, steps)
  pages = page.write_pages("Loss over learning rates", blocks, output)
  return [output / FILE, *pages[:2]]


def _train(config: ConfigDict, steps: int) -> float | None:
  """Mean loss of the last tenth of the steps."""
  experiment = coordinates.build_short_experiment(config, steps)
  state, losses = initialize_state(experiment), []
  with make_loader(experiment, 0) as loader:
    for _ in range(steps):
      batch = shard_batch(next(loader), experiment.mesh)
      state, metrics = experiment.program.update(state, batch)
      losses.append(metrics["loss"])
  loss = float(np.mean(jax.device_get(losses)[-max(1, steps // 10) :]))
  return loss if math.isfinite(loss) else None


def _describe_page(
  rows: Sequence[RateResult], field: str, steps: int
) -> Iterator[page.PageBlock]:
  yield page.Note(
    f"Mean training loss of the last tenth of {steps} steps, by learning rate "
    f"and {field} of the image tower; means over seeds."
  )
  rates = sorted({row.rate for row in rows})
  titles = [field, "", *(f"{rate:g}" for rate in rates), "best rate"]
  table, page_charts = [titles], []
  for label, has_mup in coordinates.MUP_LABELS:
    series = []
    for colour, size in enumerate(sorted({row.size for row in rows})):
      losses = {}
      for rate in rates:
        found = [
          row.loss
          for row in rows
          if (row.mup, row.size, row.rate) == (has_mup, size, rate)
        ]
        is_known = found and None not in found
        losses[rate] = float(np.mean(found)) if is_known else None
      known = {rate: loss for rate, loss in losses.items() if loss is not None}
      best = f"{min(known, key=known.get):g}" if known else "-"
      texts = [f"{x:.3f}" if x is not None else "-" for x in losses.values()]
      table.append([f"{size}", label, *texts, best])
      series.append(charts.Series(f"{field} {size}", [*losses.items()], colour))
    page_charts.append(
      charts.line_chart(
        f"loss, {label}",
        series,
        name=file_name("rates", label),
        x_label="learning rate",
        log_x=True,
      )
    )
  yield page.Table(table, numbers=2)
  yield page.Charts(page_charts)
