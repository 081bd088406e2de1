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

  @property
  def hours(self) -> float:
    return self.steps * self.step_seconds / 3600

  @property
  def chip_hours(self) -> float:
    return self.hours * self.topology.chips

  @property
  def dollars(self) -> float | None:
    return self.chip_hour and self.chip_hour * self.chip_hours

  @property
  def images_per_second(self) -> float:
    """Images that all hosts deliver together."""
    return self.batch_size / self.step_seconds

  def to_dict(self) -> dict[str, Any]:
    """The figures as plain values; bytes and requests are the bucket's."""
    rate, plane = self.images_per_second, self.data_plane
    return {
      "basis": self.basis,
      "step_seconds": self.step_seconds,
      "hours": self.hours,
      "chip_hours": self.chip_hours,
      "dollars": self.dollars,
      "images_per_second": rate,
      "images_per_second_per_host": rate / self.topology.hosts,
      "bucket_bytes_per_second": plane and rate * plane.bytes_per_example,
      "bucket_requests_per_second": plane and rate * plane.requests_per_example,
    }

  def __str__(self) -> str:
    values, price = self.to_dict(), self.dollars
    text = f"at {self.basis} {_format_hours(self.hours)}, "
    text += f"{_round(self.chip_hours)} chip-hours"
    text += "" if price is None else f", ${_round(price)}"
    text += f"; the hosts deliver {self.images_per_second:,.0f} images/s, "
    text += f"{values['images_per_second_per_host']:,.0f} each"
    if self.data_plane:
      text += (
        f"; buckets {values['bucket_bytes_per_second'] / 1e6:,.0f} MB/s in "
        f"{values['bucket_requests_per_second']:,.0f} requests/s"
      )
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


def _format_hours(hours: float) -> str:
  return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.2g} h"


def _round(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
