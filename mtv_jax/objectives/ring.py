"""Every row of the batch against every column, around a ring of devices.

Gathered, each device compares its own rows with the columns of all devices: its
logits grow with their number. Around the ring, it holds the columns of one
device at a time and hands them on to its neighbour (the chunked loss of Zhai et
al. 2023, SigLIP): its logits are those of two devices, whatever their number.

The loss is a plain sum over pairs, so that its gradients can be had on the way:
those of the columns go around with the columns. The backward pass then only
multiplies; it sends nothing and compares nothing again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PyTree

from mtv_jax import sharding
from mtv_jax.objectives import pairwise

METHODS = ("auto", "gathered", "ring")
AXES = sharding.BATCH[0]


@no_type_check  # JAX rebuilds trees with leaves that are not arrays.
@flax.struct.dataclass
class Side:
  """What is compared: images and captions, or regions and phrases.

  Attributes:
    embedding: of unit length.
    marks: arrays `[n, ...]` without gradient, such as which rows are valid.
  """

  embedding: Float[Array, "n d"]
  marks: PyTree


# (logits [n, c], marks of the rows, marks of the columns) -> losses [n], each
# row's sum over these columns, and a tree [n, ...] of what to report of them.
Judge = Callable[[Array, PyTree, PyTree], tuple[Array, PyTree]]
# Reports on some columns and on others -> the report on all of them.
Join = Callable[[PyTree, PyTree], PyTree]


@no_type_check  # The same.
@flax.struct.dataclass
class Compared:
  """What comparing all rows with all columns gives.

  Attributes:
    loss: sum of the losses of all pairs.
    report: what the judge reports, for each row; without gradient.
  """

  loss: Float[Array, ""]
  report: PyTree


def is_meant(method: str, mesh: Mesh | None) -> bool:
  """Whether a ring is meant: `'auto'` is one where the batch is split.

  Args:
    method: one of `METHODS`.
    mesh: that the batch is split over; without one all is on one device.
  """
  if mesh is None or method == "gathered":
    return False
  return method == "ring" or sharding.batch_shards(mesh) > 1


def around(
  rows: Side,
  columns: Side,
  affine: pairwise.Affine,
  *,
  judge: Judge,
  join: Join,
  mesh: Mesh,
) -> Compared:
  """Sums a loss over all pairs, a device's share of the columns at a time.

  Equal to the sum over all logits in value and gradient, up to the order of
  additions. Of `n` devices each sends `n - 1` chunks of columns, and where
  gradients are taken `n` chunks of these. Devices along `tensor` do the same.

  Args:
    rows: split over the devices, as the batch is; they stay where they are.
    columns: as many; their chunks go around.
    affine: from cosine to logit.
    judge: of a chunk of pairs.
    join: of its reports.
    mesh: `(data, fsdp, tensor)`, whose first two divide the rows.
  """
  split, whole = PartitionSpec(AXES), PartitionSpec()
  count = sharding.batch_shards(mesh)

  def run(gradients, rows, columns, affine):
    turn = functools.partial(
      _turns, judge=judge, join=join, count=count, gradients=gradients
    )
    of_slopes = _Slopes(split, split, whole) if gradients else None
    return jax.shard_map(
      turn,
      mesh=mesh,
      in_specs=(split, split, whole),
      out_specs=(split, split, of_slopes),
    )(rows, columns, affine)

  @jax.custom_vjp
  def total(row, column, affine, row_marks, column_marks):
    losses, report, _ = run(
      False, Side(row, row_marks), Side(column, column_marks), affine
    )
    return jnp.sum(losses), report

  def forward(row, column, affine, row_marks, column_marks):
    losses, report, slopes = run(
      True, Side(row, row_marks), Side(column, column_marks), affine
    )
    return (jnp.sum(losses), report), slopes

  def backward(slopes, cotangents):
    scaled = jax.tree.map(lambda slope: cotangents[0] * slope, slopes)
    return scaled.rows, scaled.columns, scaled.affine, None, None

  total.defvjp(forward, backward)
  loss, report = total(
    rows.embedding, columns.embedding, affine, rows.marks, columns.marks
  )
  return Compared(loss, jax.lax.stop_gradient(report))


@no_type_check  # The same.
@flax.struct.dataclass
class _Slopes:
  """Gradients of the loss; those of `columns` belong to the present chunk."""

  rows: Any
  columns: Any
  affine: Any


@no_type_check  # The same.
@flax.struct.dataclass
class _Met:
  """What a device has of the columns that it has met."""

  losses: Any
  report: Any
  slopes: Any = None


def _turns(rows, columns, affine, *, judge, join, count, gradients):
  """What one device does: `(losses, report, slopes)` of its rows."""
  neighbours = [(i, (i + 1) % count) for i in range(count)]
  send = functools.partial(jax.lax.ppermute, axis_name=AXES, perm=neighbours)
  # Each device has its own sums until the end, instead of one reduction a turn.
  affine = jax.lax.pcast(affine, AXES, to="varying")

  def losses_of(row, column, affine, marks):
    logits = pairwise.logits(row, column, affine)
    losses, report = judge(logits, rows.marks, marks)
    return jnp.sum(losses), (losses, report)

  def meet(columns):
    given = (rows.embedding, columns.embedding, affine, columns.marks)
    if not gradients:
      return _Met(*losses_of(*given)[1])
    slopes, found = jax.grad(losses_of, argnums=(0, 1, 2), has_aux=True)(*given)
    return _Met(*found, _Slopes(*slopes))

  def add(met, columns):
    # Neither what is sent here nor the next chunk waits for these logits.
    new, old = meet(columns), met.slopes
    slopes = None
    if gradients:
      sent = _Slopes(old.rows, send(old.columns), old.affine)
      slopes = jax.tree.map(jnp.add, sent, new.slopes)
    return _Met(met.losses + new.losses, join(met.report, new.report), slopes)

  def turn(carry, _):
    columns, met = carry
    return (send(columns), add(met, columns)), None

  met = meet(columns)
  if count > 1:
    carry = (send(columns), met)
    # The last chunk is not sent on.
    (columns, met), _ = jax.lax.scan(turn, carry, length=count - 2)
    met = add(met, columns)
  slopes = met.slopes
  if gradients:
    slopes = _Slopes(
      rows=slopes.rows,
      columns=send(slopes.columns),
      affine=jax.lax.psum(slopes.affine, AXES),
    )
  return met.losses, met.report, slopes
