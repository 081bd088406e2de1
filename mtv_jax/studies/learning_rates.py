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
from mtv_jax.studies.arms import Arm
from mtv_jax.train.config import resolve
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import make_loader
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
    overrides: of the config, without seed and rate.
    mup: whether the model has muP.
    seed: the run's seed.
    size: width or depth of the image tower, whichever differs.
    rate: `config.optim.lr`.
    loss: mean of the loss over the last tenth of the steps; None if it is not
      finite.
  """

  model: str
  overrides: list[str]
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
  it if everything but the models, rates and seeds is equal; one call at a time.
  `models` are as for `scaling` studies. Either widths or depths must differ.
  """
  if not rates or not all(0 < rate < float("inf") for rate in rates):
    raise ConfigError("study rates: pass positive --rates, such as 1e-3 2e-3.")
  arms, field = coordinates.make_mup_arms(
    config, models, steps=steps, seeds=seeds
  )
  settings = json.loads(overrides.override(config, ["optim.lr=0"]).to_json())
  data = dict(steps=steps, size=field, config=settings, rows=[])
  output.mkdir(parents=True, exist_ok=True)
  found = read_json(output / FILE) if (output / FILE).is_file() else data
  if not isinstance(found, dict) or found | {"rows": []} != data:
    raise ConfigError(
      f"{output / FILE} has another config or number of steps, or is damaged: "
      "choose another --output."
    )
  rows = [RateResult(**row) for row in found["rows"]]
  planned = [*_plan_rows(config, arms, rates, field)]
  known = {(row.model, row.mup): row.overrides for row in rows}
  for row, _ in planned:
    if known.get((row.model, row.mup), row.overrides) != row.overrides:
      raise ConfigError(
        f"{output / FILE} has a model {row.model!r} of other settings: choose "
        "another name."
      )
  for row, changed in planned:
    if row in [dataclasses.replace(done, loss=None) for done in rows]:
      continue
    rows.append(dataclasses.replace(row, loss=_train(changed, steps)))
    data["rows"] = [*map(dataclasses.asdict, rows)]
    atomic.write_text(output / FILE, json.dumps(data, indent=1) + "\n")
    label = "muP" if row.mup else "standard"
    print(f"{row.model} {label}, rate {row.rate}: {rows[-1].loss}", flush=True)
  blocks = _describe_page(rows, field, steps)
  pages = page.write_pages("Loss over learning rates", blocks, output)
  return [output / FILE, *pages[:2]]


def _plan_rows(
  config: ConfigDict, arms: Sequence[Arm], rates: Sequence[float], field: str
) -> Iterator[tuple[RateResult, ConfigDict]]:
  """Rows without their losses, and configs, of all arms at all rates."""
  for arm, rate in itertools.product(arms, dict.fromkeys(rates)):
    changed = overrides.override(config, (*arm.overrides, f"optim.lr={rate}"))
    run = resolve(changed)
    row = RateResult(
      arm.name.rpartition("-")[0],
      [*arm.overrides[:-1]],  # The seed is last.
      run.model.has_mup,
      run.seed,
      getattr(run.model.spec.image, field),
      rate,
      None,
    )
    yield row, changed


def _train(config: ConfigDict, steps: int) -> float | None:
  """Mean loss of the last tenth of the steps."""
  run = coordinates.build_short_run(config, steps)
  state, losses = initialize_state(run), []
  with make_loader(run, 0) as loader:
    for _ in range(steps):
      batch = shard_batch(next(loader), run.mesh)
      state, metrics = run.train_step.update(state, batch)
      losses.append(metrics["loss"])
  loss = float(np.mean(jax.device_get(losses)[-max(1, steps // 10) :]))
  return loss if math.isfinite(loss) else None


def _describe_page(
  rows: Sequence[RateResult], field: str, steps: int
) -> Iterator[page.PageBlock]:
  yield page.Note(
    f"Mean training loss of the last tenth of {steps} steps, by learning rate "
    f"and {field} of the image tower; means over the seeds that all rates of a "
    "model share."
  )
  rates = sorted({row.rate for row in rows})
  table = [["model", field, "", *map("{:g}".format, rates), "best rate"]]
  page_charts = []
  for label, has_mup in coordinates.MUP_LABELS:
    series = []
    for colour, name in enumerate(dict.fromkeys(row.model for row in rows)):
      found = [r for r in rows if (r.model, r.mup) == (name, has_mup)]
      if not found:  # A model whose trainings were stopped.
        continue
      losses = _average_seeds(found, rates)
      known = {rate: loss for rate, loss in losses.items() if loss is not None}
      best = f"{min(known, key=known.get):g}" if known else "-"
      texts = [f"{x:.3f}" if x is not None else "-" for x in losses.values()]
      table.append([name, f"{found[0].size}", label, *texts, best])
      series.append(charts.Series(name, [*losses.items()], colour))
    page_charts.append(
      charts.line_chart(
        f"loss, {label}",
        series,
        name=file_name("rates", label),
        x_label="learning rate",
        log_x=True,
      )
    )
  yield page.Table(table, numbers=3)
  yield page.Charts(page_charts)


def _average_seeds(
  rows: Sequence[RateResult], rates: Sequence[float]
) -> dict[float, float | None]:
  """Mean losses over the seeds that all trained rates of a model share."""
  by_rate = {x: {r.seed: r.loss for r in rows if r.rate == x} for x in rates}
  seeds = set.intersection(*(set(x) for x in by_rate.values() if x))
  means = {}
  for rate, losses in by_rate.items():
    values = [losses.get(seed) for seed in seeds]
    is_known = values and None not in values
    means[rate] = float(np.mean(values)) if is_known else None
  return means
