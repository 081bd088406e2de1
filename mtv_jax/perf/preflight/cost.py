"""Hours, chip-hours, price and input of a whole run, at a time of a step."""

import dataclasses
from typing import Any

from mtv_jax.perf.data_plane import DataPlane
from mtv_jax.perf.topologies import Topology
from mtv_jax.train import plan as plan_lib
from mtv_jax.train.build_step import TrainStep


@dataclasses.dataclass(frozen=True)
class RunCost:
  """Time and price of all steps of a run, without anything between them."""

  basis: str  # What gives the time of a step, such as "40 % MFU".
  step_seconds: float
  steps: int
  batch_size: int
  topology: Topology
  chip_hour: float | None = None  # Dollars; None: unknown.
  data_plane: DataPlane | None = None

  def to_dict(self) -> dict[str, Any]:
    """The figures as plain values; bytes and requests are the bucket's."""
    hours = self.steps * self.step_seconds / 3600
    chip_hours = hours * self.topology.chips
    rate, plane = self.batch_size / self.step_seconds, self.data_plane
    return {
      "basis": self.basis,
      "step_seconds": self.step_seconds,
      "hours": hours,
      "chip_hours": chip_hours,
      "dollars": self.chip_hour and self.chip_hour * chip_hours,
      "images_per_second": rate,
      "images_per_second_per_host": rate / self.topology.hosts,
      "bucket_bytes_per_second": plane and rate * plane.bytes_per_example,
      "bucket_requests_per_second": plane and rate * plane.requests_per_example,
    }

  def __str__(self) -> str:
    _, _, hours, chip_hours, price, *rates = self.to_dict().values()
    rate, per_host, size, requests = rates
    text = f"at {self.basis} {_round(hours)} h, {_round(chip_hours)} chip-hours"
    text += "" if price is None else f", ${_round(price)}"
    text += f"; the hosts deliver {rate:,.0f} images/s, {per_host:,.0f} each"
    if self.data_plane:
      text += f"; buckets {size / 1e6:,.0f} MB/s in {requests:,.0f} requests/s"
    return text


def describe(step: TrainStep, costs: list[RunCost]) -> list[str]:
  """Lines on a whole run: its length, costs and evaluations."""
  size, steps = step.config.batch_size, step.total_steps
  lines = [f"the run: {steps:,} steps of {size:,} images, {steps * size:,}"]
  lines += [f"  {cost}" for cost in costs]
  if not costs:
    lines.append("  hours: the chips' peak is unknown (--step_seconds)")
  evaluations = [
    f"{name} on {data} ({schedule})"
    for name, (data, schedule) in plan_lib.list_evaluations(step).items()
  ]
  lines.append(f"  evaluated on {'; '.join(evaluations) or 'nothing'}")
  lines.append("  not counted: compiling, evaluations, checkpoints, restarts")
  return lines


def _round(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
