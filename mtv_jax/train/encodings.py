"""The forward passes that the objectives need, each computed once.

Objectives declare encodings (tower, view, weights) with the taps they read;
`collect_encodings` takes the union and `encode` runs each once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, PyTree

from mtv_jax.augment.random import image_keys
from mtv_jax.objectives import base
from mtv_jax.parallel.constraints import constrain_batch
from mtv_jax.parallel.mesh import num_batch_shards
from mtv_jax.utils.tree import pytree_dataclass


def collect_encodings(
  objectives: Iterable[base.Objective],
) -> dict[base.Encoding, tuple[int, ...]]:
  """The distinct encodings that objectives need, with the union of taps."""
  union: dict[base.Encoding, set[int]] = {}
  for objective in objectives:
    for encoding, taps in objective.needs().encodings.items():
      union.setdefault(encoding, set()).update(taps)
  return {e: tuple(sorted(union[e])) for e in sorted(union)}


def encode(
  plan: Mapping[base.Encoding, tuple[int, ...]],
  tower_of: Callable[[base.Encoding], Any],
  params: Mapping[str, PyTree],
  fixed: Mapping[str, Mapping[str, PyTree]],
  views: Mapping[str, Any],
  batch: Mapping[str, Array],
  mesh: Mesh | None = None,
  keys: Mapping[str, Key[Array, " b"]] | None = None,
  rope_keys: Mapping[str, Key[Array, ""]] | None = None,
  convert_pixels: Callable[[base.Encoding, Array], Array] | None = None,
) -> dict[base.Encoding, Any]:
  """Runs every encoding of the plan.

  Args:
    plan: result of `collect_encodings`.
    tower_of: the linen module of an encoding.
    params: the student's parameters by tower.
    fixed: those of teachers, by `Encoding.weights` and tower, which get no
      gradient; the student's for a tower that the EMA teacher lacks.
    views: `ViewBatch`es by name. A view's `mask` hides patches from the student
      only, its `keep` from both.
    batch: token ids of text encodings: captions `[B, T]`, phrases `[B, M, T]`.
    mesh: over which the rows are sharded; None on one device.
    keys: the random keys of each view's rows, for the student's drop path;
      None for no drop path.
    rope_keys: a random key for each view, for the student's rotary positions;
      None for no augmentation.
    convert_pixels: changes a view's images to the normalisation of the
      encoding's tower; None where all have the same.

  Returns:
    Each encoding's output, a `models.vit.ImageOutput` whose arrays are
    `[B, count, ...]`, or a `models.text.TextOutput` with arrays `[B, ...]` or
    `[B, M, ...]`.
  """
  outputs = {}
  for encoding, taps in plan.items():
    is_student = encoding.weights == base.STUDENT
    if is_student:
      weights = params[encoding.tower]
    else:
      weights = fixed[encoding.weights].get(encoding.tower)
      if weights is None and encoding.weights == base.TEACHER:
        weights = params[encoding.tower]  # A teacher of heads alone.
      weights = jax.lax.stop_gradient(weights)
    tower = tower_of(encoding).clone(mesh=mesh)
    apply = functools.partial(tower.apply, {"params": weights})
    with jax.named_scope(str(encoding)):
      if encoding.tower == "text":
        tokens = batch[encoding.view]
        if encoding.distinct < 1:
          outputs[encoding] = _encode_distinct(
            apply, tokens, encoding.distinct, mesh
          )
        else:
          outputs[encoding] = _encode_text(apply, tokens, mesh)
        continue
      view, mask, draws = views[encoding.view_name], None, {}
      if is_student:
        mask = view.mask
        draws["rope_key"] = rope_keys and rope_keys[encoding.view]
        if tower.drop_path and keys is not None:
          draws["drop_path_keys"] = image_keys(
            keys[encoding.view], "drop_path", view.images.shape[1]
          )
      if convert_pixels is not None:
        view = view.replace(images=convert_pixels(encoding, view.images))
      outputs[encoding] = _encode_images(
        apply, view, mask, mesh, taps=taps, **draws
      )
  return outputs


def _encode_text(
  apply: Callable[..., Any], tokens: Int[Array, "*rows t"], mesh: Mesh | None
) -> Any:
  """The text tower on token ids `[B, T]` or `[B, M, T]`."""
  rows = constrain_batch(tokens.reshape(-1, tokens.shape[-1]), mesh)
  return _unflatten(apply(rows), tokens.shape[:-1])


def _encode_distinct(
  apply: Callable[..., Any],
  tokens: Int[Array, "*rows t"],
  share: float,
  mesh: Mesh | None,
) -> Any:
  """`_encode_text` of each distinct text of a device once.

  Where the texts of one device are more than `share` of its rows, all devices
  encode all of theirs. Values and gradients are the same either way.
  """
  shards = 1 if mesh is None else num_batch_shards(mesh)
  rows = tokens.reshape(shards, -1, tokens.shape[-1])  # [S, R, T]
  rows = constrain_batch(rows, mesh)
  limit = math.ceil(share * rows.shape[1])  # K
  distinct_rows = jax.vmap(functools.partial(find_distinct, limit=limit))(rows)

  @functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable
  )
  def encode_all(rows, distinct_rows):
    # A conditional has memory for what either branch saves: nothing here.
    del distinct_rows
    return _encode_text(apply, rows, mesh)

  def encode_distinct(rows, distinct_rows):
    texts = jnp.take_along_axis(rows, distinct_rows.first[..., None], axis=1)
    encoded = _encode_text(apply, texts, mesh)  # [S, K, ...]
    return jax.tree.map(
      lambda x: jax.vmap(lambda y, slot: y[slot])(x, distinct_rows.slot),
      encoded,
    )

  # The branch of False comes first: FLOPs are counted as that of the usual
  # case.
  overflow = jnp.any(distinct_rows.count > limit)
  output = jax.lax.cond(
    overflow, encode_all, encode_distinct, rows, distinct_rows
  )
  return jax.tree.map(
    lambda x: x.reshape(*tokens.shape[:-1], *x.shape[2:]), output
  )


@pytree_dataclass
class DistinctRows:
  """The distinct ones of R rows, K at most."""

  first: Int[Array, " k"]  # A row with each of them, beyond `count` any.
  slot: Int[Array, " r"]  # Which of them each row is.
  count: Int[Array, ""]  # May exceed K: then the others are not valid.


def find_distinct(rows: Int[Array, "r t"], *, limit: int) -> DistinctRows:
  """Finds equal rows of ids by sorting their hashes.

  Neighbours in this order are compared whole: rows of one hash that differ cost
  at most a repetition.
  """
  powers = np.cumprod(np.full(rows.shape[1], 0x01000193, np.uint32))
  hashed = jnp.sum(rows.astype(jnp.uint32) * powers, axis=1)  # Modulo 2^32.
  order = jnp.argsort(hashed, stable=True)
  ordered = rows[order]
  is_new = jnp.any(ordered[1:] != ordered[:-1], axis=1)
  is_new = jnp.concatenate([jnp.ones(1, bool), is_new])
  slots = jnp.cumsum(is_new) - 1
  first = jnp.zeros(limit, order.dtype)
  first = first.at[jnp.where(is_new, slots, limit)].set(order, mode="drop")
  slot = jnp.zeros_like(slots).at[order].set(slots)
  # In bounds where there are more than K: then they are not read.
  return DistinctRows(first, jnp.minimum(slot, limit - 1), slots[-1] + 1)


def _encode_images(
  apply: Callable[..., Any],
  view: Any,
  mask: Bool[Array, "b count n"] | None,
  mesh: Mesh | None,
  **options: Any,
) -> Any:
  """An image tower on the crops of a `ViewBatch`."""
  # [B, count, ...] -> [B count, ...]
  crops = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), (view.images, mask, view.keep)
  )
  images, mask, keep = constrain_batch(crops, mesh)
  output = apply(images, mask=mask, keep=keep, **options)
  return _unflatten(output, view.images.shape[:2])


def _unflatten(output: PyTree, lead: tuple[int, ...]) -> PyTree:
  """Splits the rows of each array into leading axes."""
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), output)
