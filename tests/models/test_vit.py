"""The image tower against NumPy, with scan, remat, layers and meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import NumpyTransformer
from random_trees import fill

from mtv_jax.config import options
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.models import layers as layers_lib
from mtv_jax.models import positions
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.models.vit import ViT, ViTSpec, patchify
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh
from mtv_jax.parallel.rules import tree_shardings
from mtv_jax.utils import resampling

SIZE, BATCH = 16, 2
BASE = ViTSpec(
  image_size=SIZE, patch_size=4, width=32, depth=3, heads=2, mlp_dim=48
)
SIGLIP = BASE
CLIP = dataclasses.replace(
  BASE,
  pool="cls", cls_token=True, pre_norm=True, patch_bias=False, gelu="quick",
  norm_eps=1e-5, projection=24,
)  # fmt: skip
DINOV2 = dataclasses.replace(
  BASE,
  pool="cls", cls_token=True, registers=3, layer_scale=1.0, gelu="exact",
  mask_token=True,
)  # fmt: skip
GIANT = dataclasses.replace(DINOV2, mlp="swiglu", registers=0)
MAE = dataclasses.replace(
  BASE, pool="mean", cls_token=True, gelu="exact", positions="sincos"
)
DINOV3 = dataclasses.replace(
  DINOV2, positions="rope", rope=positions.Rope(base=20.0, rescale=2.0)
)
MEAN = dataclasses.replace(BASE, pool="mean", registers=1, mask_token=True)
EVA02 = dataclasses.replace(
  GIANT, pool="mean", mlp_norm=True, pool_norm=True, final_norm=False
)
# These tests compile more than they compute.
FAST = {"xla_backend_optimization_level": 0}
KINDS = {
  "siglip": SIGLIP,
  "clip": CLIP,
  "dinov2": DINOV2,
  "giant": GIANT,
  "mae": MAE,
  "dinov3": DINOV3,
  "mean": MEAN,
  "eva02": EVA02,
}


def images_of(height=SIZE, width=SIZE, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(BATCH, height, width, 3))
  return jnp.asarray(images, jnp.float32)


@pytest.fixture(scope="module")
def params_of():
  @functools.cache
  def make(spec):
    init = jax.eval_shape(ViT(spec).init, jax.random.key(0), images_of())
    return fill(init["params"])

  return make


@functools.cache
def jitted(spec, layers, runtime):
  """One jit per way of running, so that tests share compilations."""

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, images, mask, keep):
    return ViT(spec, **dict(runtime)).apply(
      {"params": params}, images, layers=layers, mask=mask, keep=keep
    )

  return run


def encode(spec, params, images, *, layers=(), mask=None, keep=None, **runtime):
  run = jitted(spec, layers, tuple(runtime.items()))
  return run(params, images, mask, keep)


def numpy_sincos(side, width):
  """Rows, then columns: sines and cosines of p / 10000^(i / m)."""
  table, m = np.zeros((side * side, width)), width // 4
  for y in range(side):
    for x in range(side):
      for first, p in ((0, y), (2 * m, x)):
        for i in range(m):
          angle = p / 10_000 ** (i / m)
          table[y * side + x, first + i] = np.sin(angle)
          table[y * side + x, first + m + i] = np.cos(angle)
  return table


def numpy_rope(spec, coordinates, x):
  """Columns (head, dim) of the last tokens x [T, D] as complex numbers."""
  d, out = spec.width // spec.heads, x.copy()
  first = len(x) - len(coordinates)
  for head in range(spec.heads):
    for axis in range(2):
      for k in range(d // 4):
        period = spec.rope.base ** (k / (d / 4))
        i = head * d + axis * (d // 4) + k
        turn = np.exp(2j * np.pi * coordinates[:, axis] / period)
        z = (x[first:, i] + 1j * x[first:, i + d // 2]) * turn
        out[first:, i], out[first:, i + d // 2] = z.real, z.imag
  return out


def numpy_vit(transformer, params, image, *, mask=None, keep=None):
  """(prefix, patches, pooled, block outputs) of one image, in float64."""
  spec = transformer.spec
  g, p = spec.grid, spec.patch_size
  image = np.asarray(image, np.float64)
  flat = np.stack(
    [
      image[y * p : (y + 1) * p, x * p : (x + 1) * p].ravel()
      for y in range(g)
      for x in range(g)
    ]
  )
  x = transformer.dense(params["patch_embed"], flat)
  if mask is not None:
    x[np.asarray(mask)] = params["mask_token"]
  if spec.positions == "learned":
    x = x + np.float64(params["position_embedding"])
  if spec.positions == "sincos":
    x = x + numpy_sincos(g, spec.width)
  if spec.positions == "rope":
    order = range(len(x)) if keep is None else np.asarray(keep)
    centres = [((i // g + 0.5) / g, (i % g + 0.5) / g) for i in order]
    transformer.rotate = lambda x: numpy_rope(
      spec, 2 * np.array(centres) - 1, x
    )
  if keep is not None:
    x = x[np.asarray(keep)]
  prefix = np.zeros((0, spec.width))
  if spec.cls_token:
    prefix = np.concatenate([prefix, params["cls_token"][None]])
  if spec.registers:
    prefix = np.concatenate([prefix, params["registers"]])
  x = np.concatenate([prefix, x])
  if spec.pre_norm:
    x = transformer.norm(params["pre_norm"], x)
  outputs = transformer.blocks(params["blocks"], x)
  x = outputs[-1]
  if spec.final_norm:
    x = transformer.norm(params["norm"], x)
  prefix, patches = x[: spec.prefix], x[spec.prefix :]
  if spec.pool == "map":
    pooled = transformer.map_pool(params["pool"], patches)
  else:
    pooled = prefix[0] if spec.pool == "cls" else patches.mean(0)
  if spec.pool_norm:
    pooled = transformer.norm(params["pool_norm"], pooled)
  if spec.projection:
    pooled = transformer.dense(params["projection"], pooled)
  return prefix, patches, pooled, outputs


@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy(kind, params_of):
  spec = KINDS[kind]
  params, images = params_of(spec), images_of()
  rng = np.random.default_rng(1)
  mask = jnp.asarray(rng.random((BATCH, 16)) < 0.4) if spec.mask_token else None
  keep = None
  if kind in ("mean", "mae", "dinov3"):
    keep = jnp.asarray([rng.permutation(16)[:5] for _ in range(BATCH)])
  out = encode(spec, params, images, layers=(0, 2), mask=mask, keep=keep)
  for i in range(BATCH):
    prefix, patches, pooled, blocks = numpy_vit(
      NumpyTransformer(spec),
      params,
      images[i],
      mask=None if mask is None else mask[i],
      keep=None if keep is None else keep[i],
    )
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    close(out.prefix[i], prefix)
    close(out.patches[i], patches)
    close(out.pooled[i], pooled)
    assert set(out.intermediates) == {0, 2}
    for layer, intermediates in out.intermediates.items():
      close(intermediates[i], blocks[layer])


def gradients(spec, params, images, *, layers=(), **runtime):
  """Value, layers and gradient of a loss that every output reaches."""

  @functools.partial(jax.jit, compiler_options=FAST)
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, images):
    out = ViT(spec, **runtime).apply({"params": params}, images, layers=layers)
    loss = (out.pooled**2).mean() + jnp.sin(out.patches).mean()
    return loss, out.intermediates

  (loss, intermediates), grads = run(params, images)
  return loss, intermediates, grads


@pytest.fixture(scope="module")
def unrolled(params_of):
  runtime = dict(scan=False, remat="dots", layers=tuple(range(DINOV2.depth)))
  return gradients(DINOV2, params_of(DINOV2), images_of(), **runtime)


@pytest.mark.parametrize(
  "remat, layers", [("none", (2, 0)), ("dots_no_batch", (1,))]
)
def test_scan_remat_and_layers(remat, layers, params_of, unrolled):
  loss, intermediates, grads = gradients(
    DINOV2, params_of(DINOV2), images_of(), remat=remat, layers=layers
  )
  np.testing.assert_allclose(loss, unrolled[0], rtol=1e-6)
  assert set(intermediates) == set(layers)
  for layer in layers:
    np.testing.assert_allclose(
      intermediates[layer], unrolled[1][layer], atol=5e-6
    )
  for got, want in zip(
    jax.tree.leaves(grads), jax.tree.leaves(unrolled[2]), strict=True
  ):
    scale = np.linalg.norm(want) + 1e-8
    assert np.linalg.norm(got - want) <= 1e-5 * scale + 1e-8


def test_every_parameter_has_a_finite_gradient(unrolled):
  flat, _ = jax.tree_util.tree_flatten_with_path(unrolled[2])
  for path, grad in flat:
    assert np.isfinite(grad).all(), path
    # Without a mask nothing reads the mask token.
    assert np.abs(grad).max() > 0 or path[-1].key == "mask_token", path


def test_bfloat16_is_close(params_of):
  params, images = params_of(DINOV2), images_of()
  full = encode(DINOV2, params, images)
  half = encode(DINOV2, params, images, dtype=jnp.bfloat16)
  assert half.patches.dtype == jnp.bfloat16
  assert half.pooled.dtype == jnp.float32
  for got, want in ((half.pooled, full.pooled), (half.patches, full.patches)):
    error = np.linalg.norm(np.float32(got) - want) / np.linalg.norm(want)
    assert 0 < error < 0.03


def test_other_sizes_resample_the_positions(params_of):
  params, images = params_of(SIGLIP), images_of(24, 8)
  stored = np.asarray(params["position_embedding"]).reshape(4, 4, -1)
  grid = np.einsum(
    "yi,xj,ijd->yxd",
    resampling.resize_matrix(4, 6),
    resampling.resize_matrix(4, 2),
    stored,
  )
  flat = patchify(images, 4) @ params["patch_embed"]["kernel"]
  x = flat + params["patch_embed"]["bias"] + grid.reshape(-1, SIGLIP.width)
  block = layers_lib.Block(SIGLIP.heads, SIGLIP.mlp_dim, parent=None)
  first = jax.tree.map(lambda p: p[0], params["blocks"])
  apply = jax.jit(block.apply, compiler_options=FAST)
  want = apply({"params": first}, jnp.asarray(x, jnp.float32))
  out = encode(SIGLIP, params, images, layers=(0,))
  np.testing.assert_allclose(out.intermediates[0], want, atol=1e-5)


def test_fixed_positions_are_no_parameters(params_of):
  assert "position_embedding" not in params_of(MAE)
  table = positions.sincos_positions((2, 3), 16)
  np.testing.assert_allclose(
    table, numpy_sincos(3, 16)[[0, 1, 2, 3, 4, 5]], atol=1e-6
  )
  with pytest.raises(ValueError, match="divisible by 4, not 6"):
    positions.sincos_positions((2, 2), 6)


def test_tensor_sharding_needs_no_all_to_all(params_of):
  """Heads and hidden units split over devices: two all-reduces a block."""
  spec = dataclasses.replace(SIGLIP, pool="mean")
  mesh = make_mesh(dict(data=4, tensor=2))
  params = {k: v for k, v in params_of(SIGLIP).items() if k != "pool"}
  sharded = jax.device_put(params, tree_shardings(params, mesh))
  images = jnp.concatenate([images_of()] * 4)
  by_data = jax.sharding.NamedSharding(mesh, BATCH_SPEC)
  keep = jnp.tile(jnp.arange(8)[::-1], (8, 1))
  run = jax.jit(
    lambda p, x, k: ViT(spec).apply({"params": p}, x, keep=k).pooled
  )
  compiled = run.lower(
    sharded, *jax.device_put((images, keep), by_data)
  ).compile()
  text = compiled.as_text()
  for bad in ("all-to-all", "all-gather(", "collective-permute("):
    assert bad not in text, bad
  assert "all-reduce" in text
  got = compiled(sharded, *jax.device_put((images, keep), by_data))
  np.testing.assert_allclose(got, run(params, images, keep), atol=1e-5)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"image_size": 18}, "18x18 pixels.*nearest valid size is 16x16"),
    ({"heads": 5}, "width 32 is not divisible by its 5 heads: choose"),
    ({"pool": "cls"}, "needs cls_token=True"),
    ({"pool": "mapp"}, "Did you mean 'map'"),
    ({"positions": "sincoss"}, "Did you mean 'sincos'"),
    ({"gelu": "fast"}, "exact"),
    ({"depth": 0}, "depth is 0"),
    ({"registers": -1}, "registers is -1"),
    ({"position_resize": "cubic"}, "bicubic"),
    ({"rope": positions.Rope()}, "set positions='rope'"),
    ({"positions": "rope", "heads": 16}, "multiple of 4 channels per head"),
  ],
)
def test_bad_specs(fields, message):
  with pytest.raises(ValueError, match=message):
    options.build(ViTSpec, {**dataclasses.asdict(BASE), **fields}, where="spec")


@pytest.mark.parametrize(
  "shape, kwargs, message",
  [
    ((SIZE, SIZE, 1), {}, "Repeat the channel of grey images"),
    ((SIZE, 18, 3), {}, "16x18 pixels.*16x16"),
    ((SIZE, SIZE, 3), {"layers": (1, 3)}, r"layers \[3\].*0 .*to 2"),
    ((SIZE, SIZE, 3), {"remat": "ful"}, "Did you mean 'full'"),
    ((SIZE, SIZE, 3), {"mask": (1, 16)}, "needs a mask token"),
    ((SIZE, SIZE, 3), {"spec": DINOV2, "mask": (1, 9)}, r"\(1, 9\).*\(1, 16\)"),
  ],
)
def test_bad_calls(shape, kwargs, message, params_of):
  kwargs = {"spec": BASE, **kwargs}
  if "mask" in kwargs:
    kwargs["mask"] = jnp.zeros(kwargs["mask"], bool)
  params, images = params_of(kwargs["spec"]), jnp.zeros((1, *shape))
  with pytest.raises(ValueError, match=message):
    encode(params=params, images=images, **kwargs)


def test_rope_draws():
  """Ranges, means, and which draws are common to the axes."""
  rope = positions.Rope(shift=0.25, jitter=1.5, rescale=2.0)
  count = 8000
  factors, terms = np.moveaxis(rope.draw(jax.random.key(0), count), 1, 0)
  logs = np.log(factors)
  # log-uniform in +-l has the variance l^2 / 3; the rescale is common.
  jitter, rescale = np.log(1.5) ** 2 / 3, np.log(2.0) ** 2 / 3
  np.testing.assert_allclose(logs.mean(0), 0, atol=0.03)
  covariance = np.cov(logs.T)
  np.testing.assert_allclose(np.diag(covariance), jitter + rescale, rtol=0.06)
  np.testing.assert_allclose(covariance[0, 1], rescale, rtol=0.08)
  assert 2.9 < factors.max() <= 3.0 + 1e-5
  shift = terms / factors
  assert 0.24 < shift.max() <= 0.25 and -0.25 <= shift.min() < -0.24
  np.testing.assert_allclose(np.cov(shift.T)[0, 1], 0, atol=1e-3)
  # Draws only the requested augmentation.
  factors, terms = np.moveaxis(
    positions.Rope(rescale=2.0).draw(jax.random.key(0), 5), 1, 0
  )
  np.testing.assert_array_equal(factors[:, 0], factors[:, 1])
  np.testing.assert_array_equal(terms, 0)
  assert len(np.unique(factors)) == 5


def test_rope_draws_move_the_coordinates_of_each_layer(params_of):
  spec = dataclasses.replace(DINOV3, depth=1)
  params = jax.tree.map(lambda x: x, params_of(DINOV3))
  params["blocks"] = jax.tree.map(lambda p: p[:1], params["blocks"])
  images, key = images_of(), jax.random.key(3)
  apply = jax.jit(ViT(spec).apply, compiler_options=FAST)
  drawn = apply({"params": params}, images, rope_key=key)
  plain = apply({"params": params}, images)
  (factors, _) = spec.rope.draw(key, 1)[0]
  assert np.abs(drawn.pooled - plain.pooled).max() > 1e-3

  class Scaled(positions.Rope):
    def coordinates(self, grid):
      return super().coordinates(grid) * np.asarray(factors)

  scaled = dataclasses.replace(spec, rope=Scaled(base=20.0))
  want = jax.jit(ViT(scaled).apply, compiler_options=FAST)(
    {"params": params}, images
  )
  np.testing.assert_allclose(drawn.patches, want.patches, atol=1e-5)


def test_rope_of_other_sizes(params_of):
  """No parameter: another size continues, and only proportions count."""
  assert "position_embedding" not in params_of(DINOV3)
  rope = positions.Rope()
  np.testing.assert_allclose(
    rope.coordinates((2, 4)),
    [[y, x] for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)],
  )
  for normalize, width in (("min", 2), ("max", 4)):
    got = positions.Rope(normalize=normalize).coordinates((2, 4))
    np.testing.assert_allclose(got[0], [1 / width - 1] * 2)
    np.testing.assert_allclose(got[-1], [3 / width - 1, 7 / width - 1])
  model = ConvertedModel(
    ModelSpec(image=DINOV3), {"image": params_of(DINOV3)}, {"size": SIZE}
  )
  larger = model.resize(2 * SIZE)
  assert larger.spec.image.image_size == 2 * SIZE
  jax.tree.map(np.testing.assert_array_equal, larger.params, model.params)
  assert ModelSpec.from_dict(larger.spec.to_dict()) == larger.spec
  images = images_of(2 * SIZE, 2 * SIZE)
  np.testing.assert_array_equal(
    encode(larger.spec.image, params_of(DINOV3), images).pooled,
    encode(DINOV3, params_of(DINOV3), images).pooled,
  )


@pytest.mark.parametrize("normalize", ["separate", "min", "max", "index"])
def test_rotary_positions_of_many_grids_are_those_of_each(params_of, normalize):
  """Rows of patches with grids equal images, and patches have positions."""
  rope = positions.Rope(base=20.0, normalize=normalize)
  spec = dataclasses.replace(DINOV3, rope=rope)
  sizes, length = [(2, 4), (3, 1)], 9
  rng = np.random.default_rng(0)
  patches = jnp.asarray(rng.normal(size=(2, length, 48)), jnp.float32)
  apply = jax.jit(ViT(spec).apply, compiler_options=FAST)
  params = {"params": params_of(spec)}
  together = apply(params, patches, grids=jnp.asarray(sizes))
  for i, (rows, columns) in enumerate(sizes):
    count = rows * columns
    image = patches[i, :count].reshape(rows, columns, 4, 4, 3)
    image = image.swapaxes(1, 2).reshape(1, 4 * rows, 4 * columns, 3)
    alone = apply(params, image)
    got = together.patches[i, :count]
    np.testing.assert_allclose(got, alone.patches[0], atol=1e-5)
    np.testing.assert_allclose(together.pooled[i], alone.pooled[0], atol=1e-5)
  swapped = apply(params, patches[:, ::-1], grids=jnp.full((2, 2), 3))
  whole = apply(params, patches, grids=jnp.full((2, 2), 3))
  assert np.abs(swapped.pooled - whole.pooled).max() > 1e-3


def test_positions_of_many_grids_are_those_of_each():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 3)))
  sizes = [(4, 4), (2, 7), (5, 1)]
  method = "bilinear_antialiased"
  together = positions.resize_grids(table, jnp.asarray(sizes), 16)
  for row, size in zip(together, sizes, strict=True):
    alone = positions.resize_grid(table, size, method).reshape(-1, 3)
    np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-6)
    assert np.isfinite(row).all()
  # Crops a square grid: equals the part of a larger image's grid.
  cut = positions.resize_grid(table, (2, 6), "crop")
  whole = positions.resize_grid(table, (6, 6), "bilinear")
  np.testing.assert_array_equal(cut, whole[:2])
