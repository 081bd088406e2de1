"""What devices exchange in the compiled step."""

import dataclasses
import math
import re

import jax
import optax
import pytest
import tiny_mtv
from step_samples import mesh_of

from mtv_jax.parallel.mesh import BATCH_SPEC
from mtv_jax.perf import hlo
from mtv_jax.train.step import make_train_step
from mtv_jax.utils.tree import flatten_with_names


@pytest.mark.slow
@pytest.mark.parametrize(
  "shape",
  [(8, 1, 1), (2, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.long)],
  ids=str,
)
def test_no_activation_is_all_gathered(shape):
  """All-gathers of the compiled step are small."""
  mesh = mesh_of(shape)
  spec = tiny_mtv.built()
  # KoLeo's groups are the rows of a device, as at the size of a pod.
  dino_objective = dataclasses.replace(
    spec.objectives["dino"], koleo_group=tiny_mtv.ROWS // 8
  )
  spec = dataclasses.replace(
    spec, objectives={**spec.objectives, "dino": dino_objective}
  )
  train_step = make_train_step(spec, optax.sgd(0.1), mesh)
  split = jax.sharding.NamedSharding(mesh, BATCH_SPEC)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
    for name, x in tiny_mtv.rows().items()
  }
  compiled = train_step.update.lower(train_step.abstract, batch).compile()
  rows = hlo.list_collectives(compiled)
  gathers = [row for row in rows if row.kind == "all-gather"]
  sizes = [x.size * 4 for x in jax.tree.leaves(train_step.abstract.params)]
  large = [row for row in gathers if row.result > max(sizes)]
  assert not large, large
  if shape == (8, 1, 1):
    # Whole parameters everywhere. Logits of Sinkhorn stay by rows.
    assert not gathers, gathers
  if mesh.shape["tensor"] == 1:
    wrong = sent_by_towers_beside_parameters(rows, train_step.abstract.params)
    assert not wrong, wrong


def sent_by_towers_beside_parameters(rows, params):
  """Exchanges within towers that carry more than parameters and gradients.

  Except look-ups in a vocabulary that is split by channels, which gather rows.
  """
  matrices, vectors = parameter_shapes(params)

  def known(shape):
    return no_ones(shape.dims) in matrices or math.prod(shape.dims) in vectors

  return [
    row
    for row in rows
    if re.search("/(ViT|TextTower)/", row.scope)
    and "/jit(_take)/" not in row.scope
    and (
      not all(map(known, hlo.parse_shapes(row.shape)))
      or (row.kind == "all-reduce" and "transpose(" not in row.scope)
    )
  ]


def parameter_shapes(params):
  """Layer shapes, whole and split once by `fsdp`, and vectors' lengths.

  Vectors may be split by heads, so only their length identifies them.
  """
  matrices, vectors = set(), {1}
  for name, leaf in flatten_with_names(params):
    dims = leaf.shape[1:] if "/blocks/" in name else leaf.shape
    fsdp = leaf.sharding.mesh.shape["fsdp"]
    matrices.add(no_ones(dims))
    for i, size in enumerate(dims):
      part = (*dims[:i], size // fsdp, *dims[i + 1 :])
      matrices.add(no_ones(part))
    if len(dims) == 1:
      vectors |= {dims[0], dims[0] // fsdp}
  return matrices, vectors


def no_ones(dims):
  """Sizes except 1, sorted, since the compiler transposes."""
  return tuple(sorted(size for size in dims if size > 1))
