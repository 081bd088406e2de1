"""Coordinate check of muP: how far a step moves activations, by model size.

Trains each model for a few steps at a constant rate, with muP and without, and
measures how far activations on the first batch move from initialisation (Yang
et al. 2021, arXiv 2203.03466, appendix D.1). For a learning rate to transfer,
this must not depend on width or depth: its log-log slope over size is near 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from mtv_jax.config import overrides
from mtv_jax.config.durations import UNITS
from mtv_jax.objectives.base import STUDENT
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.report import charts, page
from mtv_jax.studies import arms as arms_lib
from mtv_jax.studies.arms import Arm
from mtv_jax.train.config import resolve
from mtv_jax.train.forward import add_views, encode, gather_params, view_keys
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import Run, make_loader, open_run
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.text import file_name

FILE = "coordinates.json"
MUP_LABELS = (("muP", True), ("standard", False))
_NO_MUP = ("model.mup=None", "model.text.mup=None")


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """Root mean squares of one model's activation changes.

  Attributes:
    model: the arm's name.
    mup: whether the model has muP.
    seed: the run's seed.
    size: width or depth of the image tower, whichever differs.
    changes: after each step, by activation.
  """

  model: str
  mup: bool
  seed: int
  size: int
  changes: dict[str, list[float]]


def check_coordinates(
  config: ConfigDict,
  models: Sequence[str],
  output: pathlib.Path,
  *,
  steps: int = 10,
  seeds: int | str = 1,
) -> list[pathlib.Path]:
  """Trains the models; writes `coordinates.json` and a page.

  `models` are as for `scaling` studies. Either widths or depths must differ.
  """
  arms, field = make_mup_arms(config, models, steps=steps, seeds=seeds)
  rows = []
  for arm in arms:
    rows.append(_measure(config, arm, field, steps))
    print(_describe_row(rows[-1]))
  slopes = fit_slopes(rows)
  data = dict(steps=steps, size=field, slopes=slopes)
  data["rows"] = [*map(dataclasses.asdict, rows)]
  output.mkdir(parents=True, exist_ok=True)
  atomic.write_text(output / FILE, json.dumps(data, indent=1) + "\n")
  blocks = _describe_page(rows, slopes, field, steps)
  pages = page.write_pages("Coordinate check", blocks, output)
  return [output / FILE, *pages[:2]]


def make_mup_arms(
  config: ConfigDict, models: Sequence[str], *, steps: int, seeds: int | str
) -> tuple[list[Arm], str]:
  """Each model with muP and without, by seed; and the size that differs.

  An arm's last override is its seed. Raises ConfigError for a config without
  muP, and unless the models differ in width or in depth alone.
  """
  if not f"{seeds}".isdecimal() or not int(seeds) or steps < 1:
    raise ConfigError(
      f"--seeds={seeds}, --steps={steps}: expected positive integers."
    )
  resolved = resolve(config)
  if not resolved.model.has_mup:
    raise ConfigError(
      "muP is compared with the same models without it: set config.model.mup "
      "and config.model.text.mup, such as base_width=64."
    )
  options = arms_lib.Options(models=tuple(models))
  sizes, _ = arms_lib.make_arms("scaling", resolved, options)
  no_mup = _NO_MUP[: 1 + (resolved.model.text is not None)]
  arms = [
    Arm(arm.name, (*arm.overrides, *extra, f"seed={seed}"))
    for arm, extra in itertools.product(sizes, ((), no_mup))
    for seed in range(resolved.seed, resolved.seed + int(seeds))
  ]
  return arms, _find_size_field(config, sizes)


def _find_size_field(config: ConfigDict, arms: Sequence[Arm]) -> str:
  """The field of the image tower that differs between models."""
  configs = (overrides.override(config, arm.overrides) for arm in arms)
  specs = [resolve(c).model.spec.image for c in configs]
  fields = ("width", "depth")
  differing = [f for f in fields if len({getattr(s, f) for s in specs}) > 1]
  if len(differing) != 1:
    what = " and ".join(differing) or "no size"
    raise ConfigError(
      f"--models differ in {what} of the image tower; "
      "expected two or more widths, or depths."
    )
  return differing[0]


def _measure(
  config: ConfigDict, arm: Arm, field: str, steps: int
) -> Coordinates:
  """Trains one model and measures how its activations change."""
  config = overrides.override(config, arm.overrides)
  config.schedule = ConfigDict({"name": "constant"})
  changes: dict[str, list[float]] = {}
  run = build_short_run(config, steps)
  state = initialize_state(run)
  with make_loader(run, 0) as loader:
    batch = first_batch = shard_batch(next(loader), run.mesh)
    compute = _jit_activations(run)
    initial = jax.device_get(compute(state, batch))
    for _ in range(steps):
      state, _ = run.train_step.update(state, batch)
      batch = shard_batch(next(loader), run.mesh)
      for name, x in jax.device_get(compute(state, first_batch)).items():
        change = float(np.sqrt(np.mean(np.square(x - initial[name]))))
        changes.setdefault(name, []).append(change)
  config, image = run.config, run.spec.model.image
  name, size = arm.name.rpartition("-")[0], getattr(image, field)
  return Coordinates(name, config.model.has_mup, config.seed, size, changes)


def build_short_run(config: ConfigDict, steps: int) -> Run:
  """Builds a run of that many steps, without evaluations."""
  for unit in UNITS[:3]:
    config[f"total_{unit}"] = None
  config.total_steps = steps
  config.evals, config.interference = ConfigDict(), None
  with tempfile.TemporaryDirectory() as folder:
    return open_run(config, folder)


def _jit_activations(run: Run) -> Callable[..., dict[str, Array]]:
  """Jits `(state, batch) -> activations` of the student's first encodings."""
  spec, mesh = run.spec, run.mesh
  depth = spec.model.image.depth
  layers = {"first": 0, "middle": depth // 2, "last": depth - 1}
  encoding_by_tower = {
    e.tower: e for e in reversed(spec.plan) if e.weights == STUDENT
  }
  plan = {e: tuple(layers.values()) * (e.tower == "image") for e in spec.plan}
  plan = {e: plan[e] for e in encoding_by_tower.values()}

  def compute(state: Any, batch: Any) -> dict[str, Array]:
    params, state = gather_params(spec, state.params, state, mesh)
    keys = view_keys(spec, jnp.int32(0), len(batch["image"]), mesh)
    batch = add_views(spec, batch, keys, mesh)
    del batch["keys"]  # Disables stochastic depth.
    fixed = state.fixed_params
    encoded = encode(spec, params, fixed, batch, plan=plan, mesh=mesh)
    outputs = {tower: encoded[e] for tower, e in encoding_by_tower.items()}
    arrays = {f"{tower}/pooled": o.pooled for tower, o in outputs.items()}
    if image := outputs.get("image"):
      for name, layer in layers.items():
        arrays[f"image/{name}"] = image.intermediates[layer]
    if text := outputs.get("text"):
      arrays["text/tokens"] = text.tokens
    return {name: x.astype(jnp.float32) for name, x in arrays.items()}

  return jax.jit(compute)


def fit_slopes(rows: Sequence[Coordinates]) -> dict[str, dict[str, float]]:
  """Slopes of log change after the last step over log size, by activation."""
  slopes: dict[str, dict[str, float]] = {}
  for name, (label, has_mup) in itertools.product(rows[0].changes, MUP_LABELS):
    selected = [r for r in rows if r.mup == has_mup]
    x = np.log([r.size for r in selected])
    y = np.log([r.changes[name][-1] for r in selected])
    slopes.setdefault(name, {})[label] = float(np.polyfit(x, y, 1)[0])
  return slopes


def _describe_row(row: Coordinates) -> str:
  texts = [f"{name} {x[-1]:.3g}" for name, x in row.changes.items()]
  return f"{row.model} {'muP' if row.mup else 'standard'}: {', '.join(texts)}"


def _describe_page(
  rows: Sequence[Coordinates], slopes: Any, field: str, steps: int
) -> Iterator[page.PageBlock]:
  yield page.Note(
    f"Root mean square of the change of activations on the first batch after "
    f"{steps} steps at a constant rate, over the {field} of the image tower. "
    "Slopes are in log-log coordinates: 0 if a step moves activations equally "
    "at any size."
  )
  table = [["activation", *(f"slope, {label}" for label, _ in MUP_LABELS)]]
  table += [[n, *(f"{x:+.2f}" for x in s.values())] for n, s in slopes.items()]
  yield page.Table(table, numbers=1)
  page_charts = []
  for name in slopes:
    series = []
    for colour, (label, has_mup) in enumerate(MUP_LABELS):
      logs: dict[int, list[float]] = {}
      for r in rows:
        if r.mup == has_mup:
          logs.setdefault(r.size, []).append(np.log(r.changes[name][-1]))
      points = [(x, float(np.exp(np.mean(y)))) for x, y in sorted(logs.items())]
      series.append(charts.Series(label, points, colour))
    options = dict(name=file_name("coordinates", name), x_label=field)
    page_charts.append(
      charts.line_chart(name, series, log_x=True, log_y=True, **options)
    )
  yield page.Charts(page_charts)
