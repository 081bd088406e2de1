"""Which of the built-in scenes an evaluation with two splits renders itself.

`scenes`, or `{type="scenes", first=..., length=..., size=..., seed=...}` as a
source of `mtv_jax.data` has them. Left open, `first` is the first that is held
out; the scenes to train a probe on start `PROBE_SCENES` later than `first`, or
there, as `datasets.labelled` has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import registry as datasets


@dataclasses.dataclass(frozen=True)
class Series:
  """Some scenes.

  Attributes:
    numbers: of the scenes.
    size: pixels a side.
    seed: the series that the numbers count in.
  """

  numbers: tuple[int, ...]
  size: int
  seed: int

  def digest(self) -> str:
    """A hash of which scenes these are."""
    digest = examples.Digest()
    first, count = self.numbers[0], len(self.numbers)
    digest.add("scenes", first, count, self.size, self.seed)
    if self.numbers != tuple(range(first, first + count)):
      digest.add(*self.numbers)
    return digest.hex()


def series(
  data: datasets.Data,
  *,
  split: str,
  count: int | None,
  default: int,
  size: int,
  needs: str,
) -> Series:
  """The scenes of a split.

  Args:
    data: see the top of the file.
    split: `train` or `test`.
    count: how many, evenly spaced where `length` gives more; None for all.
    default: how many there are where neither says.
    size: pixels a side where `data` does not say.
    needs: what the evaluation reads of a source, for the error.

  Raises:
    NotApplicable: for a source of another type.
    ValueError: for an option that scenes do not have, or `count` below 1.
  """
  from mtv_jax.data.sources import registry as sources

  given = dict(data) if isinstance(data, Mapping) else {"type": "scenes"}
  if not datasets.is_scenes(given):
    raise NotApplicable(
      f"data={given}: this evaluation reads {needs}, which among the sources "
      'only {type: "scenes"} has'
    )
  if count is not None and count < 1:
    raise ValueError(f"count={count}; expected at least 1, or None for all")
  given = {"length": count or default, "size": size, **given}
  if split == "train":
    given["first"] = datasets.PROBE_SCENES + given.get("first", 0)
  given.setdefault("first", datasets.HELD_OUT_SCENES)
  source = sources.build_source(given)
  numbers = range(source.first, source.first + source.length)
  return Series(
    tuple(examples.spaced(numbers, count)), source.size, source.seed
  )
