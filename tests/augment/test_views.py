"""Views: real images against Pillow, keys, meshes, labels, bad configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from PIL import Image
from step_samples import mesh_of

from mtv_jax.augment import geometry, views
from mtv_jax.augment.random import row_keys
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.parallel.mesh import BATCH_SPEC
from mtv_jax.utils.errors import ConfigError

GLOBAL = "crop(32, 0.32, 1.0)|flip|jitter|grey|blur(1.0)|blocks(0.2, 0.5, p=1)"


def build(ops, **options):
  return views.build_views({"v": {"ops": ops, **options}})["v"]


def run(view, canvas, image_size, *, keys=None, dtype=jnp.float32):
  if keys is None:
    keys = row_keys(jax.random.key(0), view.name, 0, len(canvas))
  compiled = jax.jit(lambda c, s, k: view(c, s, k, dtype))
  return compiled(jnp.asarray(canvas), jnp.asarray(image_size), keys)


@pytest.fixture(scope="module")
def noise():
  """Random canvases and sizes of four images."""
  rng = np.random.default_rng(0)
  return (
    rng.integers(0, 256, (4, 48, 48, 3), dtype=np.uint8),
    np.array([[48, 64], [100, 50], [30, 30], [20, 200]], np.int32),
  )


def read_images(folder, canvas, every=1):
  """Canvases of real images, squashed, and their original sizes."""
  paths = sorted(folder.glob("coco/*2017/*.jpg"))[::every]
  assert paths
  squashed, sizes = [], []
  for path in paths:
    with Image.open(path) as image:
      sizes.append((image.height, image.width))
      image.draft("RGB", (canvas, canvas))
      image = image.convert("RGB").resize((canvas, canvas))
      squashed.append(np.asarray(image))
  return np.stack(squashed), np.array(sizes, np.int32)


def pillow_error(batch, canvas, method="bilinear"):
  """Mean absolute difference to Pillow, in levels, for every image."""
  side, size = canvas.shape[1], batch.images.shape[2]
  errors = []
  for row, n in np.ndindex(*batch.images.shape[:2]):
    y0, x0, y1, x1 = np.asarray(batch.box[row, n], float) * side
    want = Image.fromarray(canvas[row]).resize(
      (size, size), Image.Resampling[method.upper()], box=(x0, y0, x1, y1)
    )
    want = np.asarray(want, np.float32)
    if batch.flipped[row, n]:
      want = want[:, ::-1]
    got = (np.asarray(batch.images[row, n], np.float32) + 1.0) * 127.5
    errors.append(np.abs(got - want).mean())
  return np.array(errors)


@pytest.mark.parametrize(
  "dtype, method",
  [
    (jnp.float32, "bilinear"),
    (jnp.bfloat16, "bilinear"),
    (jnp.float32, "bicubic"),
  ],
)
def test_crops_agree_with_pillow(shared_data, dtype, method):
  canvas, sizes = read_images(shared_data, 96, every=13)
  view = build(f"crop(56, 0.05, 1.0, method='{method}')|flip", count=2)
  batch = run(view, canvas, sizes, dtype=dtype)
  assert batch.images.dtype == dtype
  assert 0.2 < np.asarray(batch.flipped).mean() < 0.8
  # Pillow's two roundings to bytes account for 0.3 of it.
  assert pillow_error(batch, canvas, method).max() < 0.5
  if method == "bicubic":
    assert np.abs(batch.images).max() <= 1  # It overshoots, and Pillow clips.


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_crops_of_every_image_agree_with_pillow(shared_data, dtype):
  canvas, sizes = read_images(shared_data, 384)
  view = build(["crop(224, 0.32, 1.0)|flip", "crop(224, 0.05, 0.32)|flip"])
  for at in range(0, len(canvas), 16):
    part = slice(at, at + 16)
    batch = run(view, canvas[part], sizes[part], dtype=dtype)
    assert pillow_error(batch, canvas[part]).max() < 0.5


@pytest.mark.parametrize("ops", ["resize(48)", "resize(48)|solarize(0.0)"])
def test_pixels_are_normalised_as_for_evaluation(noise, ops):
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  entry = {"v": {"ops": ops}}
  view = views.build_views(entry, mean=mean, std=std)["v"]
  batch = run(view, *noise)
  preprocess = Preprocess(size=48, mean=mean, std=std)
  for row, canvas in enumerate(noise[0]):
    np.testing.assert_allclose(
      batch.images[row, 0], preprocess.normalize(canvas), atol=2e-5
    )


def test_the_whole_canvas_is_exact_in_bfloat16(noise):
  canvas, sizes = noise
  for ops in ("resize(48)", "resize(48)|flip"):
    batch = run(build(ops), canvas, sizes, dtype=jnp.bfloat16)
    want = (canvas / np.float32(127.5) - 1.0).astype(jnp.bfloat16)
    mirrored = np.asarray(batch.flipped)[..., None, None]
    want = np.where(mirrored, want[:, :, ::-1], want).astype(np.float32)
    np.testing.assert_array_equal(batch.images[:, 0].astype(np.float32), want)
    np.testing.assert_array_equal(batch.box[:, 0], [[0, 0, 1, 1]] * 4)
  assert batch.mask is None and batch.keep is None


def test_images_boxes_and_depth_stay_aligned():
  # A white rectangle, its box, and a depth map of another resolution.
  side, labels = 96, 64
  box = np.array([0.25, 0.375, 0.625, 0.75], np.float32)
  y0, x0, y1, x1 = (box * side).astype(int)
  canvas = np.zeros((8, side, side, 3), np.uint8)
  canvas[:, y0:y1, x0:x1] = 255
  depth = np.zeros((8, labels, labels), np.float32)
  y0, x0, y1, x1 = (box * labels).astype(int)
  depth[:, y0:y1, x0:x1] = 1.0
  view = build("crop(64, 0.3, 1.0)|flip", count=2)
  batch = run(view, canvas, np.full((8, 2), 64, np.int32))
  boxes, retained = geometry.crop_boxes(
    jnp.tile(jnp.asarray(box), (8, 1, 1)),
    jnp.ones((8, 1), bool),
    batch.box,
    batch.flipped,
  )
  maps, valid = geometry.crop_maps(
    jnp.asarray(depth),
    jnp.ones(depth.shape, bool),
    batch.box,
    batch.flipped,
    size=64,
  )
  assert np.asarray(valid).all() and np.asarray(retained).sum() > 10
  bright = (np.asarray(batch.images[..., 0]) + 1) / 2
  for row, n in np.argwhere(np.asarray(retained)[..., 0]):
    top, left, bottom, right = np.asarray(boxes[row, n, 0]) * 64
    for image in (bright[row, n], np.asarray(maps[row, n])):
      # Sides are measured by summing coverage through the rectangle's middle.
      down = image[:, int((left + right) / 2)]
      across = image[int((top + bottom) / 2)]
      assert abs(down.sum() - (bottom - top)) < 0.25
      assert abs(across.sum() - (right - left)) < 0.25
      centre = (np.arange(64) + 0.5) @ across / across.sum()
      assert abs(centre - (left + right) / 2) < 0.25


def test_a_row_depends_on_neither_batch_nor_mesh(noise):
  canvas, sizes = (np.concatenate([x, x]) for x in noise)
  view = build(GLOBAL, count=2)
  keys = row_keys(jax.random.key(3), "v", 7, 8)
  whole = run(view, canvas, sizes, keys=keys)

  def check(batch, part):
    # The order of summation depends on the batch size.
    np.testing.assert_allclose(batch.images, whole.images[part], atol=2e-5)
    for name in ("box", "flipped", "mask"):
      want = getattr(whole, name)[part]
      np.testing.assert_array_equal(getattr(batch, name), want)

  check(run(view, canvas[3:5], sizes[3:5], keys=keys[3:5]), slice(3, 5))
  split = NamedSharding(mesh_of((8, 1, 1)), BATCH_SPEC)

  def sharded(canvas, sizes, step):
    keys = row_keys(jax.random.key(3), "v", step, 8)
    return view(canvas, sizes, keys, jnp.float32)

  arrays = jax.device_put((canvas, sizes), split)
  batch = jax.jit(sharded, out_shardings=split)(*arrays, jnp.asarray(7))
  check(batch, slice(0, 8))


def test_keys_differ_by_view_step_and_row():
  seed = jax.random.key(0)
  keys = [
    row_keys(s, name, step, 3)
    for s in (seed, jax.random.key(1))
    for name in ("a", "b")
    for step in (0, 1)
  ]
  data = np.concatenate([jax.random.key_data(k) for k in keys])
  assert len(np.unique(data, axis=0)) == 24
  longer = row_keys(seed, "a", jnp.asarray(0), 5)
  np.testing.assert_array_equal(
    jax.random.key_data(longer)[:3], jax.random.key_data(keys[0])
  )


def test_images_of_one_view_differ_and_stay_in_order(noise):
  canvas, sizes = noise
  first, second = "crop(16, 0.1, 0.5)", "crop(16, 0.1, 0.5)|solarize(1, 0)"
  mixed = run(build([first, second, first]), canvas, sizes)
  plain = run(build(first, count=3), canvas, sizes)
  assert len(np.unique(np.asarray(plain.box[0]), axis=0)) == 3
  np.testing.assert_array_equal(mixed.box, plain.box)
  inverted = jnp.array([1, -1, 1])[:, None, None, None]
  np.testing.assert_allclose(mixed.images, plain.images * inverted, atol=2e-5)


def test_an_op_of_probability_zero_leaves_the_others_unchanged(noise):
  canvas, sizes = noise
  with_op = run(build("crop(16)|flip|jitter(0)|keep(patch=8)"), canvas, sizes)
  without = run(build("crop(16)|flip|keep(patch=8)"), canvas, sizes)
  np.testing.assert_array_equal(with_op.box, without.box)
  np.testing.assert_allclose(with_op.images, without.images, atol=1e-5)
  assert with_op.keep.shape == (4, 1, 1)


def test_tiny_crops_of_extreme_images_are_finite():
  canvas = np.zeros((3, 16, 16, 3), np.uint8)
  canvas[1] = 255
  canvas[2, ::2] = 255
  sizes = np.array([[1, 5000], [5000, 1], [0, 0]], np.int32)
  ops = "crop(32, 1e-6, 1e-5)|flip|jitter(1.0)|grey|blur(1.0)|solarize"
  batch = run(build(ops, count=2), canvas, sizes, dtype=jnp.bfloat16)
  for leaf in jax.tree.leaves(batch):
    assert np.isfinite(np.asarray(leaf, np.float32)).all()
  assert np.abs(np.asarray(batch.images, np.float32)).max() <= 1.01


def test_one_of_two_images_is_masked(noise):
  ops = ["resize(32)|blocks(0.25, 0.5, p=0.5, patch=8)"] * 2
  view = build(ops)
  hidden = run(view, *noise).mask.sum(2)
  assert ((hidden > 0).sum(1) == 1).all()
  assert hidden.sum(1).max() <= view.max_masked


def test_each_image_is_masked_by_its_own_ops(noise):
  blocks = "resize(32)|blocks(0.25, {}, p={}, patch=8)"
  cases = ((0.25, 1), (0.25, 0), (0.5, 1), (0.25, 0))
  view = build([blocks.format(*case) for case in cases])
  hidden = np.asarray(run(view, *noise).mask.sum(2))
  assert (hidden[:, [1, 3]] == 0).all() and (hidden[:, 0] == 4).all()
  assert (hidden[:, 2] >= 4).all() and hidden.sum(1).max() <= view.max_masked


def test_static_properties():
  view = build(GLOBAL.replace("0.5", "0.4"), count=2)
  assert (view.count, view.size, view.patch, view.max_masked) == (2, 32, 16, 4)
  half = build("resize(32)|blocks(0.5, 0.5, p=0.5, patch=8)", count=2)
  assert half.max_masked == 8
  some = build(["resize(32)|blocks(0.25, 0.25, p=0.3, patch=8)"] * 4)
  assert some.max_masked == 2 * 4
  never = build("resize(32)|blocks(0.5, 0.5, p=0, patch=8)")
  assert never.max_masked == 8  # A mask, always empty.
  view = build("resize(224)|keep(0.25)")
  assert (view.count, view.size, view.patch, view.max_masked) == (1, 224, 16, 0)
  assert build("resize(224)").patch is None


def test_a_canvas_of_another_shape_is_rejected():
  keys = row_keys(jax.random.key(0), "v", 0, 2)
  shape = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.uint8)
  with pytest.raises(Exception, match=r"canvas|\[2, 8, 6, 3\]"):
    jax.eval_shape(
      lambda c: build("resize(4)")(
        c, jnp.ones((2, 2), jnp.int32), keys, jnp.float32
      ),
      shape,
    )


@pytest.mark.parametrize(
  "ops, message",
  [
    ("cropp(224)", "unknown view op 'cropp'. Did you mean 'crop'"),
    ("crop(224, area=0.1)", "area.*Its parameters are: crop"),
    ("crop()", "Its parameters are: crop"),
    ("crop(224, 0.5, 0.1)", "areas from 0.5 to 0.1 must ascend"),
    ("crop(224, 0.1, 1.5)", "max_area is 1.5, expected a number .* <= 1"),
    ("crop(224, ratio=(2.0, 0.5))", "ratio from 2.0 to 0.5"),
    ("crop(0)", "size is 0, expected an integer >= 1"),
    ("resize(224.0)", "size is 224.0, expected an integer >= 1"),
    ("crop(8)|grey('a')", "p is 'a', expected a number .* <= 1"),
    (
      "crop(8)|blur(sigma=2.0)",
      r"sigma is 2.0, expected \(a number > 0, a number",
    ),
    (
      "crop(8)|blur(sigma=(1, 2, 3))",
      r"expected \(a number > 0, a number > 0\)",
    ),
    ("crop(8)|blur(kernel=4)", "kernel is 4, expected an odd number"),
    ("crop(8)|keep(0)", "ratio is 0, expected a number > 0 and <= 1"),
    ("crop(8)|jitter(hue=0.6)", "hue is 0.6, expected a number .* <= 0.5"),
    ("", "0 ops choose the view's box"),
    ("resize(256)|crop(224)", "2 ops choose the view's box"),
    ("crop(224)|flip|flip", "more than one op of flip"),
    ("crop(224)|blocks|keep", "more than one op of masks"),
    ("jitter|crop(224)", r"crop \(geometry\) comes after jitter"),
    ("crop(224)|blocks|blur", r"blur \(photometrics\) comes after blocks"),
    ("crop(224)|blocks(patch=14)|", "can't read the ops"),
    ("crop(224)|blocks(patch=15)", "don't divide a view of 224"),
    ("crop(224)|blocks(0.5, 1.0)", "leaves no patch visible"),
    ("crop(16)|keep(0.25)", "raise ratio"),
    ("crop(4)|blur", "9 taps are too many"),
    ("crop(8)|jitter(1.2)", "p is 1.2, expected a number >= 0 and <= 1"),
    ("crop(8)|jitter(contrast=-0.1)", "contrast is -0.1"),
    ("crop(8)|blur(1e999)", "p is inf"),
    ("crop(8)|blur(sigma=(2.0, 0.1))", "sigma from 2.0 to 0.1 must ascend"),
    ("crop(8)|blur(kernel=1)", "kernel is 1, expected an integer >= 3"),
    ("crop(8)|solarize(threshold=300)", "threshold is 300"),
    ("crop(8)|blocks(0.5, 0.1)", "from 0.5 to 0.1 must ascend"),
  ],
)
def test_bad_ops_are_rejected_with_the_view_and_the_fix(ops, message):
  with pytest.raises(ConfigError, match=message) as error:
    build(ops)
  assert str(error.value).startswith("config.views.v")


@pytest.mark.parametrize(
  "entry, message",
  [
    ({"ops": ["resize(8)"], "count": 2}, "1 op strings for count=2: set one"),
    ({"ops": ["resize(8)", "resize(16)"]}, "differ in sizes: 8 and 16"),
    ({"ops": ["resize(16)|blocks(0.5, 0.5, patch=8)", "resize(16)"]}, "kinds"),
    ({"ops": [f"resize(64)|keep({r})" for r in (0.25, 0.5)]}, "4 and 8"),
    (
      {"ops": "resize(8)", "number": 2},
      "no option 'number'.*count, crops_of, ops",
    ),
    ({"count": 2}, "v.ops is missing"),
    ({"ops": "resize(8)", "count": 0}, "count is 0"),
  ],
)
def test_bad_views_are_rejected(entry, message):
  with pytest.raises(ConfigError, match=message):
    views.build_views({"v": entry})
