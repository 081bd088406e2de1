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
from jaxtyping import Array, Bool, Float, PyTree

from mtv_jax.objectives import pairwise
from mtv_jax.parallel import sharding

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
  send = _send(count)
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


@no_type_check  # The same.
@flax.struct.dataclass
class _Best:
  """Of each row the nearest that it has met, and which row of all it is."""

  cosine: Any
  index: Any
  vector: Any


def nearest(
  vectors: Float[Array, "n d"], valid: Bool[Array, " n"], *, mesh: Mesh
) -> Float[Array, "n d"]:
  """Each row's nearest other row by cosine, found around the ring.

  All rows go around once. Their gradients are those of whoever has them for a
  neighbour, and go around once more. Gathered, the compiler for TPUs would
  bring all rows to all devices three times, and sum the gradients of all rows
  on all devices.

  Args:
    vectors: of unit length, split over the devices as the batch is.
    valid: which rows are there, as themselves and as neighbours.
    mesh: `(data, fsdp, tensor)`, whose first two divide the rows.

  Returns:
    Some row for those that have no neighbour; of equals the first.
  """
  split, count = PartitionSpec(AXES), sharding.batch_shards(mesh)
  mapped = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(split, split), out_specs=split
  )

  @jax.custom_vjp
  def find(x, valid):
    return mapped(functools.partial(_search, count=count))(x, valid).vector

  def forward(x, valid):
    best = mapped(functools.partial(_search, count=count))(x, valid)
    return best.vector, best.index

  def backward(index, slopes):
    give = functools.partial(_give_back, count=count)
    return mapped(give)(slopes, index), None

  find.defvjp(forward, backward)
  return find(vectors, valid)


def _send(count: int) -> Callable[[PyTree], PyTree]:
  """To the next device of the ring."""
  neighbours = [(i, (i + 1) % count) for i in range(count)]
  return functools.partial(jax.lax.ppermute, axis_name=AXES, perm=neighbours)


def _search(x, valid, *, count):
  """What one device does to find its rows' neighbours."""
  size, me = len(x), jax.lax.axis_index(AXES)

  def look(columns, there, turn):
    owner = (me - turn) % count
    cosines = jnp.matmul(x, columns.T, precision="highest")
    own = (owner == me) & jnp.eye(size, dtype=bool)
    others = valid[:, None] & there & ~own
    cosines = jnp.where(others, cosines, -2.0)
    at = jnp.argmax(cosines, axis=1)
    return _Best(jnp.max(cosines, axis=1), owner * size + at, columns[at])

  def step(carry, turn):
    (columns, there), old = carry
    columns, there = _send(count)((columns, there))
    new = look(columns, there, turn)
    first = (new.cosine == old.cosine) & (new.index < old.index)
    nearer = (new.cosine > old.cosine) | first
    best = _Best(
      jnp.where(nearer, new.cosine, old.cosine),
      jnp.where(nearer, new.index, old.index),
      jnp.where(nearer[:, None], new.vector, old.vector),
    )
    return ((columns, there), best), None

  start = ((x, valid), look(x, valid, 0))
  (_, best), _ = jax.lax.scan(step, start, jnp.arange(1, count))
  return best


def _give_back(slopes, index, *, count):
  """Gradients of neighbours, summed where these rows are."""
  size, me = len(slopes), jax.lax.axis_index(AXES)

  def step(total, turn):
    theirs = index // size == (me - turn) % count
    part = jnp.where(theirs[:, None], slopes, 0.0)
    return _send(count)(total.at[index % size].add(part)), None

  return jax.lax.scan(step, jnp.zeros_like(slopes), jnp.arange(count))[0]
