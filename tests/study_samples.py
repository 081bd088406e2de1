"""Folders of runs and studies with invented numbers, for tests of reports."""

import json
import math

import numpy as np
from PIL import Image

OBJECTIVES = ("contrastive", "dino", "grounding", "depth")
BLOCKS = ("embedding", "0", "1", "2", "3", "pool")
METRICS = {
  "zero_shot": {"top1": 0.05, "top5": 0.25},
  "retrieval": {"text_to_image_r1": 0.001},
  "depth_probe": {"rmse": 3.15, "delta1": None},
}


def write_run(
  folder,
  *,
  seed=0,
  objectives=OBJECTIVES,
  gain=0.0,
  steps=400,
  sheets=("examples",),
  interference=True,
  variant="mu/8",
):
  """Writes a finished run's folder; `gain` raises its metrics."""
  rng = np.random.default_rng([seed, len(objectives)])
  (folder / "evals").mkdir(parents=True)
  config = dict(
    seed=seed, batch_size=64, total_steps=steps, model={"variant": variant},
    objectives={name: {"weight": 1.0} for name in objectives},
    evals={name: {} for name in METRICS},
  )  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "checkpoints" / str(steps)).mkdir(parents=True)
  rows = []
  for step in range(20, steps + 1, 20):
    row = {"step": step, "grad_norm": 1 + 1 / step}
    for k, name in enumerate(objectives):
      noise = 0.05 * rng.normal()
      row[f"{name}/loss"] = (k + 1) * (0.5 + math.exp(-step / 90)) + noise
    row["loss"] = sum(row[f"{name}/loss"] for name in objectives)
    speed = {"images_per_second": 210.0, "wait": 0.0, "core_hours": step / 9e3}
    rows.append(row | {f"speed/{k}": v for k, v in speed.items()})
  for step in (steps // 2, steps):
    for evaluation, chances in METRICS.items():
      path = folder / "evals" / f"{evaluation}_{step}.json"
      reached = (gain + 0.02 * rng.normal()) * step / steps
      result = _write_evaluation(path, chances, reached)
      values = {f"{evaluation}/{k}": v for k, v in result["metrics"].items()}
      rows.append({"step": step} | values)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metrics.jsonl").write_text(text)
  for name in sheets:
    path = folder / "evals" / f"depth_probe_{steps}" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    ramp = (np.add.outer(np.arange(180), np.arange(420)) % 256).astype("u1")
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp], -1)).save(path)
  if interference:
    rows = (_measure(rng, i, objectives) for i in range(100, steps + 1, 100))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "interference.jsonl").write_text(text)
  return folder


def write_study(
  folder,
  kind,
  arms,
  *,
  baseline=None,
  seeds=3,
  budget=1.0,
  flops=None,
  **options,
):
  """Writes a study; `arms` are (name, objectives, gain), with more options."""
  runs, steps = [], round(400 * budget)
  for name, objectives, gain, *more in arms:
    for seed in range(seeds):
      own = dict(seed=seed, objectives=objectives, gain=gain, steps=steps)
      path = folder / "runs" / f"{name}-s{seed}"
      run = write_run(path, **{**own, **options, **dict(*more)})
      settings = json.loads((run / "config.json").read_text())
      row = dict(name=run.name, arm=name, seed=seed, steps=steps)
      row |= dict(flops=flops and budget * flops, settings=settings)
      runs.append(row | dict(overrides=[f"seed={seed}"]))
  study = dict(
    format=1, fingerprint="0123", kind=kind, config="study", match="images",
    baseline=baseline or arms[0][0], budget=budget, costs={}, runs=runs,
  )  # fmt: skip
  (folder / "study.json").write_text(json.dumps(study))
  return folder


def _write_evaluation(path, chances, gain):
  evaluation, is_depth = path.stem.rpartition("_")[0], "rmse" in chances
  metrics = {
    name: min(0.95, 0.3 * (k + 1) + gain) for k, name in enumerate(chances)
  }
  if is_depth:
    metrics["rmse"] = chances["rmse"] * (0.6 - gain)
  result = dict(
    metrics=metrics, protocol={"data_hash": evaluation},
    chance={k: v for k, v in chances.items() if v is not None},
    units={"rmse": "m"} if is_depth else {},
    lower=["rmse"] if is_depth else [], errors=dict.fromkeys(chances, 0.01),
  )  # fmt: skip
  content = {"encoder": "a", "weights": "student", "mtv_jax": "0"}
  path.write_text(json.dumps(content | {"evals": {evaluation: result}}))
  return result


def _measure(rng, step, objectives):
  size, blocks = len(objectives), len(BLOCKS)
  cosines = rng.uniform(-0.6, 0.9, (size, size, blocks))
  cosines = (cosines + cosines.swapaxes(0, 1)) / 2
  cosines[np.arange(size), np.arange(size)] = 1
  upper = cosines[np.triu_indices(size, 1)]
  return dict(
    step=step, objectives=list(objectives), blocks=list(BLOCKS),
    norms=rng.uniform(0.1, 2, (size, blocks)).tolist(),
    cosines=cosines.tolist(),
    conflicts=float((upper < 0).mean()) if upper.size else 0.0,
    transfer=rng.uniform(-0.01, 0.03, (size, size)).tolist(),
  )  # fmt: skip
