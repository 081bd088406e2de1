"""DPT: resampling, taps, and Depth Anything V2's shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.models.heads import dpt
from mtv_jax.utils.resampling import resize_matrix
from mtv_jax.utils.tree import flatten_with_names, map_with_names


@pytest.mark.parametrize(
  ("depth", "taps"),
  [
    (12, (2, 5, 8, 11)),
    (24, (4, 11, 17, 23)),
    (40, (9, 19, 29, 39)),
    (27, (6, 13, 20, 26)),
    (2, (0, 0, 1, 1)),
  ],
)
def test_quarter_taps(depth, taps):
  assert dpt.quarter_taps(depth) == taps


def test_default_channels_equal_depth_anything():
  assert dpt.default_features(768) == 128
  assert dpt.default_channels(768) == (96, 192, 384, 768)
  assert dpt.default_features(1024) == 256
  assert dpt.default_channels(1024) == (256, 512, 1024, 1024)
  assert dpt.default_features(64) == 16
  assert dpt.default_channels(64) == (8, 16, 32, 64)


@pytest.mark.parametrize(("old", "new"), [(3, 7), (7, 3), (4, 4), (1, 5)])
def test_resize_aligns_corners(old, new):
  matrix = resize_matrix(old, new, "bilinear_corners")
  values = np.arange(old) * 2.0
  np.testing.assert_allclose(
    matrix @ values, np.linspace(0, values[-1], new), atol=1e-6
  )


def test_resize_to_one_pixel_takes_the_first():
  matrix = resize_matrix(5, 1, "bilinear_corners")
  np.testing.assert_array_equal(matrix, [[1, 0, 0, 0, 0]])


def _stages(rng, width, grid):
  return [
    jnp.asarray(rng.normal(size=(2, *grid, width)), jnp.float32)
    for _ in range(dpt.STAGES)
  ]


def _params(head, stages, size):
  """Drawn here: compiling the initialisers takes longer than the test."""
  shapes = jax.eval_shape(
    lambda: head.init(jax.random.key(0), stages, size)["params"]
  )
  rng = np.random.default_rng(2)

  def draw(name, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if name.endswith("kernel"):
      return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])))
    return jnp.asarray(name.endswith("scale") + 0.1 * noise)

  return map_with_names(draw, shapes)


def test_prediction_is_float32_and_each_stage_has_a_norm():
  head = dpt.DPT(features=8, channels=(4, 8, 8, 16), upsample=1)
  stages = _stages(np.random.default_rng(0), 16, (2, 2))
  params = _params(head, stages, (8, 8))
  assert {f"norm{i}" for i in range(1, 5)} < set(params)
  half = [x.astype(jnp.bfloat16) for x in stages]
  run = jax.jit(head.apply, static_argnums=2)
  exact = run({"params": params}, stages, (8, 8))
  rough = run({"params": params}, half, (8, 8))
  assert rough.dtype == jnp.float32
  error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.05
  # The size of a stage's tokens makes no difference.
  scaled = run({"params": params}, [100 * x for x in stages], (8, 8))
  np.testing.assert_allclose(scaled, exact, rtol=1e-3, atol=1e-4)


def test_every_parameter_has_a_gradient():
  head = dpt.DPT(features=8, channels=(4, 8, 8, 16))
  stages = _stages(np.random.default_rng(1), 16, (2, 4))
  params = _params(head, stages, (8, 16))
  grads = jax.jit(
    jax.grad(
      lambda p: jnp.square(head.apply({"params": p}, stages, (8, 16))).sum()
    )
  )(params)
  for name, grad in flatten_with_names(grads):
    assert np.abs(grad).max() > 0, name


def test_invalid_stages_and_options_raise():
  head = dpt.DPT(features=8, channels=(4, 8, 8, 16))
  stages = _stages(np.random.default_rng(0), 16, (2, 2))
  with pytest.raises(ValueError, match="4 stages, not 3"):
    head.init(jax.random.key(0), stages[:3], (8, 8))
  wrong = dpt.DPT(features=8, channels=(4, 8, 8, 16), activation="relo")
  with pytest.raises(ValueError, match="relu"):
    wrong.init(jax.random.key(0), stages, (8, 8))


def _of_torch(state, features):
  """Our parameters from DepthAnythingForDepthEstimation's.

  Convolutions go from [out, in, y, x] to [y, x, in, out]; transposed ones,
  [in, out, y, x], to columns (y, x, out); the fusion layers, deepest first,
  are counted from the shallowest.
  """

  def conv(name):
    entry = {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0)}
    if f"{name}.bias" in state:
      entry["bias"] = state[f"{name}.bias"]
    return entry

  params = {f"conv{i}": conv(f"head.conv{i}") for i in (1, 2, 3)}
  for i in range(4):
    layer = f"neck.reassemble_stage.layers.{i}"
    entry = {"projection": conv(f"{layer}.projection")}
    if i < 2:
      kernel = state[f"{layer}.resize.weight"].transpose(0, 2, 3, 1)
      entry["resize"] = {
        "kernel": kernel.reshape(len(kernel), -1),
        "bias": state[f"{layer}.resize.bias"],
      }
    elif i == 3:
      entry["resize"] = conv(f"{layer}.resize")
    params[f"reassemble{i + 1}"] = entry
    params[f"lateral{i + 1}"] = conv(f"neck.convs.{i}")
    layer = f"neck.fusion_stage.layers.{3 - i}"
    params[f"fusion{i + 1}"] = {
      "projection": conv(f"{layer}.projection"),
      **{
        f"residual{j}": {
          f"conv{k}": conv(f"{layer}.residual_layer{j}.convolution{k}")
          for k in (1, 2)
        }
        for j in ((1, 2) if i < 3 else (2,))
      },
    }
  return params


@pytest.mark.reference
@pytest.mark.parametrize("grid", [(4, 4), (5, 7)], ids=str)
def test_equals_transformers_depth_anything(grid):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = transformers.DepthAnythingForDepthEstimation(
    transformers.DepthAnythingConfig(
      backbone_config=transformers.Dinov2Config(
        image_size=56,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
      ),
      reassemble_hidden_size=32,
      neck_hidden_sizes=[8, 16, 16, 32],
      fusion_hidden_size=16,
      head_hidden_size=8,
    )
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 25
      parameter.normal_(0.0, fan_in**-0.5)
    # Positive predictions: with a dead ReLU any two models agree.
    model.head.conv3.bias.fill_(3.0)
  size = (14 * grid[0], 14 * grid[1])
  pixels = torch.randn(2, 3, *size)
  with torch.no_grad():
    expected = model(pixels).predicted_depth.numpy()
    tokens = model.backbone(pixels).feature_maps
  stages = [jnp.asarray(t[:, 1:].reshape(2, *grid, 32).numpy()) for t in tokens]
  head = dpt.DPT(
    features=16,
    channels=(8, 16, 16, 32),
    head_features=8,
    tap_norm="none",
    activation="relu",
  )
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  params = _of_torch(state, 16)
  shapes = jax.eval_shape(
    lambda: head.init(jax.random.key(0), stages, size)["params"]
  )
  for (name, ours), (other, given) in zip(
    flatten_with_names(shapes), flatten_with_names(params), strict=True
  ):
    assert (name, ours.shape) == (other, given.shape)
  result = jax.jit(head.apply, static_argnums=2)(
    {"params": params}, stages, size
  )
  assert (expected > 0).mean() > 0.5
  assert expected.std() > 0.1
  np.testing.assert_allclose(result, expected, atol=1e-4, rtol=1e-5)
