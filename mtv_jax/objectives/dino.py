"""DINO self-distillation loss, with the KoLeo regularizer.

Cross-entropy between prototype assignments of student and EMA teacher on views
of an image (Caron et al. 2021).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from mtv_jax.config import options
from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import base
from mtv_jax.objectives.prototypes import PrototypeObjective
from mtv_jax.parallel.mesh import BATCH_SPEC, data_rows, num_batch_shards
from mtv_jax.parallel.rules import constrain_batch
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass


def group_rows(
  x: Shaped[Array, "n ..."],
  size: int,
  mesh: Mesh | None = None,
  *,
  strided: bool = False,
) -> Shaped[Array, "g s ..."]:
  """Splits rows into groups of `size`; zero-pads the last rows.

  A group has consecutive rows or, if `strided`, every g-th row, in the order of
  the data, so that groups don't depend on the mesh. Consecutive rows stay on a
  device with a multiple of `size` rows; strided rows move between all devices.
  """
  rows, size = len(x), min(size, len(x))
  groups, shards = -(-rows // size), num_batch_shards(mesh) if mesh else 1
  if mesh is not None and (strided or rows // shards % size):
    x = _sort_shards(x, mesh)
  x = jnp.pad(x, [(0, groups * size - rows)] + [(0, 0)] * (x.ndim - 1))
  if not strided:
    return x.reshape(groups, size, *x.shape[1:])
  # Without the constraint the compiler would gather all rows.
  x = x.reshape(size, groups, *x.shape[1:]).swapaxes(0, 1)
  return constrain_batch(x, mesh)


def _sort_shards(
  x: Shaped[Array, "n ..."], mesh: Mesh
) -> Shaped[Array, "n ..."]:
  """Sends each shard to the device at its position in the data."""
  shard_rows = len(x) // num_batch_shards(mesh)
  targets = (data_rows(len(x), mesh)[::shard_rows] // shard_rows).tolist()
  if targets == sorted(targets):
    return x
  send = functools.partial(
    jax.lax.ppermute, axis_name=BATCH_SPEC[0], perm=list(enumerate(targets))
  )
  return jax.shard_map(
    send, mesh=mesh, in_specs=BATCH_SPEC, out_specs=BATCH_SPEC
  )(x)


def nearest_neighbours(
  x: Float[Array, "g s d"], valid: Bool[Array, "g s"]
) -> Int[Array, "g s"]:
  """Index of each unit vector's nearest valid neighbour in its group."""
  cosines = jnp.einsum("gnd,gmd->gnm", x, x, precision="highest")
  pairs = valid[:, :, None] & valid[:, None] & ~jnp.eye(x.shape[1], dtype=bool)
  return jnp.argmax(jnp.where(pairs, cosines, -2.0), axis=2)


def koleo(
  vectors: Float[Array, "n d"],
  valid: Bool[Array, " n"],
  *,
  group: int = 64,
  eps: float = 1e-8,
  mesh: Mesh | None = None,
  strided: bool = False,
) -> base.WeightedMean:
  """KoLeo regularizer (Sablayrolles et al. 2019) in groups of rows.

      L = -(1/n) sum_i log(min_{j != i} |x_i - x_j| + eps),  |x| = 1

  The neighbour j is searched among the `group` rows of a group (`group_rows`).
  DINOv2 searches the 12 to 64 images of a GPU, DINOv3 groups of 16: in a much
  larger set the nearest neighbour has the image's class, so KoLeo would repel
  images of one class. Groups of a lane's consecutive rows would too, if shards
  are sorted by class.

  Normalises the vectors, then averages over valid vectors; groups with fewer
  than two valid vectors are excluded. `eps` bounds value and gradient for
  equal vectors. `mesh` shards the vectors.
  """
  group_fn = functools.partial(
    group_rows, size=group, mesh=mesh, strided=strided
  )
  x, valid = group_fn(unit(vectors)), group_fn(valid)  # [g, s, d], [g, s]
  index = nearest_neighbours(x, valid)
  neighbours = jnp.take_along_axis(x, index[..., None], axis=1)  # [g, s, d]
  # Not sqrt(2 - 2 cos), which cancels for close neighbours.
  squared_distances = jnp.sum(jnp.square(x - neighbours), axis=2)  # [g, s]
  losses = -jnp.log(jnp.sqrt(squared_distances + eps**2) + eps)
  has_neighbour = jnp.sum(valid, axis=1, keepdims=True) > 1
  weights = (valid & has_neighbour).astype(jnp.float32)
  return base.WeightedMean(jnp.sum(losses * weights), jnp.sum(weights))


def pair_weights(
  global_views: int, local_views: int, *, same_crop: str
) -> Float[np.ndarray, "g v"]:
  """Weights of teacher views (rows) against student views, global crops first.

  Each pair has the weight 1 / (number of pairs), as in DINOv2: 2 x 1 global and
  2 x 8 local terms, each a mean over the batch, are divided by 18.
  `same_crop='exclude'` omits a global crop against itself.
  """
  pairs = np.ones((global_views, global_views + local_views), np.float32)
  if same_crop == "exclude":
    pairs[:, :global_views] -= np.eye(global_views, dtype=np.float32)
  if not pairs.any():
    raise ConfigError("dino compares views: set count=2 or a local view.")
  return pairs / pairs.sum()


@pytree_dataclass
class LossInputs:
  """Per example: bottleneck vectors, and the student's pooled vectors."""

  teacher: Float[Array, "b g d"]  # Global crops.
  student: Float[Array, "b v d"]  # Global crops, then local crops.
  pooled: Float[Array, "b g e"]  # Global crops.


@dataclasses.dataclass(frozen=True)
class DINO(PrototypeObjective):
  """DINO loss (Caron et al. 2021) on the pooled vector, as in DINOv2 and SILC.

  The teacher encodes the global crops unmasked. The student encodes the global
  crops, masked if the view has a mask, and the local crops. With one global
  crop, only local crops are compared with it, as in SigLIP 2.
  """

  group = "ssl"

  view_global: str = "global"
  view_local: str | None = "local"
  # Weight of KoLeo on the student's pooled vectors, summed over global crops;
  # DINOv2 uses 0.1.
  koleo_weight: options.NonNegativeFloat = 0.1
  # Images per group of the KoLeo search; up to 64 in DINOv2.
  koleo_group: Annotated[int, options.Range(min=2)] = 64
  # Whether to compare a global crop with itself; DINO excludes it.
  same_crop: Literal["exclude", "include"] = "exclude"

  def resolve(self, spec, views, teachers=base.NO_TEACHERS) -> DINO:
    names = [self.view_global, self.view_local]
    counts = [views[n].count if n in views else 0 for n in names]
    if self.view_global in views:
      pair_weights(*counts, same_crop=self.same_crop)
    return self

  def _channels(self, spec) -> int:
    return spec.image.embed_dim

  @property
  def _student(self) -> list[base.Encoding]:
    views = (self.view_global, self.view_local)
    return [base.Encoding("image", view) for view in views if view is not None]

  @property
  def _teacher(self) -> base.Encoding:
    return base.Encoding("image", self.view_global, base.TEACHER)

  def needs(self) -> base.Needs:
    encodings = [*self._student, self._teacher]
    return base.Needs(encodings=dict.fromkeys(encodings, ()))

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    pooled = [encodings[e].pooled for e in self._student]  # [b, g | l, E]
    return LossInputs(
      teacher=heads[self.head, base.TEACHER](encodings[self._teacher].pooled),
      student=heads[self.head](jnp.concatenate(pooled, axis=1)),
      pooled=pooled[0],
    )

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    rows, crops = loss_inputs.teacher.shape[:2]
    num_local = loss_inputs.student.shape[1] - crops
    pairs = pair_weights(crops, num_local, same_crop=self.same_crop)  # [g, v]
    total, report, statistics = self.prototype_loss(
      loss_inputs.teacher,
      loss_inputs.student,
      valid=jnp.ones((rows, crops), bool),
      weights=jnp.broadcast_to(pairs, (rows, *pairs.shape)),
      heads=heads,
      context=context,
    )
    count = jnp.ones(()) * rows
    report = {**report, "labelled": base.WeightedMean(count, count)}
    if self.koleo_weight:
      if rows < 2:
        raise ConfigError(
          f"dino: koleo_weight={self.koleo_weight} compares images of the "
          f"global batch, which has {rows}: raise batch_size, or disable KoLeo."
        )
      kwargs = dict(
        group=self.koleo_group, mesh=context.mesh, strided=context.in_lanes
      )
      valid = jnp.ones(rows, bool)
      # One call per crop index, so that crops of one image are never compared.
      koleo_loss = sum(
        koleo(loss_inputs.pooled[:, i], valid, **kwargs).value()
        for i in range(crops)
      )
      report["koleo"] = base.WeightedMean(koleo_loss / crops, jnp.ones(()))
      report["cross_entropy"] = base.WeightedMean(total, count)
      total = total + self.koleo_weight * rows * koleo_loss
    report = jax.lax.stop_gradient(report)
    return base.Terms(base.WeightedMean(total, count), report, statistics)
