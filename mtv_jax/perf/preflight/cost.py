"""Hours, chip-hours, price and input of a whole run, from a step's time."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtv_jax.hooks.evaluation import list_evaluations
from mtv_jax.perf.preflight.compile import CompilePlan


def compute_costs(
  plan: CompilePlan, step_seconds: Mapping[str, float], chip_hour: float | None
) -> list[dict[str, Any]]:
  """Computes the costs of all steps, without evaluations, checkpoints, etc.

  `step_seconds` maps a basis ("40 % MFU") to seconds; `chip_hour`: dollars.
  """
  costs = []
  for basis, seconds in step_seconds.items():
    hours, rate = seconds / 3600, plan.config.batch_size / seconds
    hours *= plan.total_steps
    costs.append(
      {
        "basis": basis,
        "step_seconds": seconds,
        "hours": hours,
        "chip_hours": hours * plan.topology.chips,
        "dollars": chip_hour and chip_hour * hours * plan.topology.chips,
        "images_per_second": rate,
        "images_per_second_per_host": rate / plan.topology.hosts,
      }
    )
  return costs


def format_run(
  plan: CompilePlan, costs: Sequence[Mapping[str, Any]], row_bytes: int
) -> list[str]:
  """Describes the planned run: its length, costs and evaluations."""
  size, steps = plan.config.batch_size, plan.total_steps
  lines = [f"the run: {steps:,} steps of {size:,} images, {steps * size:,}"]
  for cost in costs:
    hours, chip_hours = _format(cost["hours"]), _format(cost["chip_hours"])
    price = cost["dollars"] and f", ${_format(cost['dollars'])}"
    rate, per_host = (
      cost[f"images_per_second{suffix}"] for suffix in ("", "_per_host")
    )
    lines.append(
      f"  at {cost['basis']} {hours} h, {chip_hours} chip-hours{price or ''};"
      f" the hosts must deliver {rate:,.0f} images/s, {per_host:,.0f} each"
      f" ({per_host * row_bytes / 1e6:,.0f} MB/s of rows)"
    )
  if not costs:
    lines.append("  hours: the chips' peak is unknown (--step_seconds)")
  evaluations = list_evaluations(plan.config, plan.length)
  texts = [f"{n} on {data} ({when})" for n, (data, when) in evaluations.items()]
  lines.append(f"  evaluated on {'; '.join(texts) or 'nothing'}")
  lines.append("  not counted: compiling, evaluations, checkpoints, restarts")
  return lines


def _format(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
