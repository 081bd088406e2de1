"""Depth Anything V2: folders, preprocessing, predictions, labels."""

import functools
import json

import numpy as np
import pytest
from labelling_samples import mesh_of

import mtv_jax
from mtv_jax.convert import depth_anything as weights
from mtv_jax.convert.tables import ConversionError
from mtv_jax.data import canvas
from mtv_jax.data.labels.label_values import DepthLabel
from mtv_jax.experts import base, depth_anything
from mtv_jax.experts.base import Expert
from mtv_jax.experts.depth_anything import MEAN, STD, DepthPreprocess
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import flatten_with_names

CONFIG = {
  "model_type": "depth_anything",
  "backbone_config": {
    "model_type": "dinov2",
    "image_size": 42,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "out_indices": [1, 2, 3, 4],
  },
  "reassemble_hidden_size": 16,
  "neck_hidden_sizes": [4, 8, 8, 16],
  "fusion_hidden_size": 8,
  "head_hidden_size": 4,
}


def _tensors(config=CONFIG):
  """Random tensors of every name that the config's model has."""
  rng = np.random.default_rng(0)
  spec = weights.read_spec(config, ["backbone.embeddings.mask_token"])
  tensors = {}
  for rule in weights.param_mapping(spec):
    for name, shape in rule.expected_shapes():
      scale = max(1, int(np.prod(shape[1:]))) ** -0.5
      tensors[name] = (scale * rng.normal(size=shape)).astype(np.float32)
  # Makes the map positive and varied.
  tensors["head.conv3.weight"] = abs(tensors["head.conv3.weight"])
  return tensors


def _write(folder, config=CONFIG, tensors=None):
  from safetensors.numpy import save_file

  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors or _tensors(config), folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return _write(tmp_path_factory.mktemp("depth") / "tiny")


# The official code's sizes by (rows, columns), from docs/experts.md.
SIZES = {
  (480, 640): (518, 686),
  (768, 1024): (518, 686),
  (500, 2000): (518, 2072),
  (384, 512): (518, 686),
  (200, 300): (518, 784),
  (300, 200): (784, 518),
  (518, 518): (518, 518),
}


@pytest.mark.parametrize("image", SIZES, ids=str)
def test_sizes_are_the_references(image):
  assert DepthPreprocess(max_aspect=9).resized_shape(*image) == SIZES[image]
  assert DepthPreprocess("square").resized_shape(*image) == (518, 518)


def test_long_images_are_squeezed_and_shapes_are_few():
  inputs = DepthPreprocess()
  assert inputs.resized_shape(500, 2000) == (518, 1036)
  assert inputs.resized_shape(2000, 500) == (1036, 518)
  rng = np.random.default_rng(0)
  sides = rng.integers(20, 3000, size=(20000, 2))
  shapes = {inputs.resized_shape(*map(int, pair)) for pair in sides}
  assert len(shapes) == 75
  assert all(not side % 14 for shape in shapes for side in shape)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"size": 500}, "nearest is 504"),
    ({"preprocess": "orginal"}, "Did you mean 'original'"),
    ({"max_aspect": 0.5}, "max_aspect=0.5"),
  ],
)
def test_invalid_options_are_rejected(options, message):
  with pytest.raises(ValueError, match=message):
    DepthPreprocess(**options)


def _cubic(x, a):
  x = abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _neighbours(image, new, axis):
  """Four neighbours a dimension, edges repeated, in float64."""
  old = image.shape[axis]
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  total = 0
  for step in range(-1, 3):
    at = np.floor(centre) + step
    weight = _cubic(centre - at, -0.75)
    taken = np.take(image, at.clip(0, old - 1).astype(int), axis=axis)
    total = total + taken * np.expand_dims(weight, (1 - axis, 2))
  return total


def test_original_is_bicubic_on_floats_without_antialiasing():
  image = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
  inputs = DepthPreprocess(size=28)
  height, width = inputs.resized_shape(40, 61)
  wanted = _neighbours(image / 255, height, 0)
  wanted = (_neighbours(wanted, width, 1) - MEAN) / STD
  pixels = inputs(image)
  assert pixels.shape == (28, 42, 3) and pixels.dtype == np.float32
  np.testing.assert_allclose(pixels, wanted, atol=2e-5)
  # "square" is the canvas, normalised.
  got = DepthPreprocess("square", size=28)(image)
  pixels = canvas.squash(image, 28) / 255
  np.testing.assert_allclose(got, (pixels - MEAN) / STD, atol=1e-6)


def test_every_tensor_of_a_folder_is_read(folder):
  spec, params = weights.read(folder)
  assert spec.layers == (0, 1, 2, 3)
  assert spec.image.patch_size == 14
  shapes = weights.abstract_params(spec)
  read = {n: leaf.shape for n, leaf in flatten_with_names(params)}
  assert read == {n: leaf.shape for n, leaf in flatten_with_names(shapes)}
  # The transposed convolution: [in, out, y, x] to columns (y, x, out).
  tensors = _tensors()
  stored = tensors["neck.reassemble_stage.layers.1.resize.weight"]
  kernel = params["depth"]["reassemble2"]["resize"]["kernel"]
  assert kernel[3, (1 * 2 + 0) * 8 + 5] == stored[3, 5, 1, 0]
  # Ours count fusions from the shallowest, files from the deepest.
  fusion = "neck.fusion_stage.layers"
  stored = tensors[f"{fusion}.3.residual_layer1.convolution2.weight"]
  kernel = params["depth"]["fusion1"]["residual1"]["conv2"]["kernel"]
  np.testing.assert_array_equal(kernel, stored.transpose(2, 3, 1, 0))


def test_tensors_that_are_missing_or_unexpected(tmp_path):
  fusion = "neck.fusion_stage.layers"
  tensors = _tensors()
  bias = np.zeros(8, np.float32)
  # Unused layers may be in the file, and nothing else.
  tensors[f"{fusion}.0.residual_layer1.convolution1.bias"] = bias
  weights.read(_write(tmp_path / "a", tensors=tensors))
  lost = f"{fusion}.2.residual_layer2.convolution1.bias"
  del tensors[lost]
  tensors["head.conv4.bias"] = bias
  message = rf"(?s)missing.*{lost}.*unexpected.*head\.conv4\.bias"
  with pytest.raises(ConversionError, match=message):
    weights.read(_write(tmp_path / "a", tensors=tensors))
  with pytest.raises(FileNotFoundError, match="nowhere"):
    weights.read(tmp_path / "nowhere")


BACKBONE = CONFIG["backbone_config"]
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _with_backbone(**changes):
  """A config with another backbone."""
  return {"backbone_config": {**BACKBONE, **changes}}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "dpt"}, "model_type 'dpt'"),
    ({"depth_estimation_type": "metric"}, "metric"),
    ({"backbone_config": None, "backbone": "vit_small"}, "'vit_small'"),
    ({"backbone_config": "x"}, "backbone_config"),
    ({"reassemble_factors": [4, 2, 1, 1]}, "reassemble_factors"),
    ({"reassemble_factors": 3}, "reassemble_factors"),
    ({"head_in_index": 0}, "head_in_index=0"),
    ({"patch_size": 16}, "patch_size=16"),
    ({"patch_size": "a"}, "patch_size"),
    (_with_backbone(model_type="dinov2_registers"), "'dinov2_registers'"),
    (_with_backbone(apply_layernorm=False), "apply_layernorm=False"),
    (_with_backbone(out_indices=[0, 1, 2, 3]), "out_indices"),
    (_with_backbone(out_indices=[1, 2, 3, 9]), "out_indices"),
    (_with_backbone(out_indices=3), "out_indices"),
    (
      _with_backbone(out_indices=None, out_features=["stage9", *STAGES[1:]]),
      "stage9",
    ),
  ],
)
def test_unsupported_configs_are_rejected(change, message, tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps({**CONFIG, **change}))
  (tmp_path / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
  with pytest.raises(InputError, match=message):
    weights.read(tmp_path)


@pytest.mark.parametrize(
  "stages",
  [
    {"out_features": STAGES, "out_indices": None},
    {"out_indices": [1, 2, -2, 4]},
  ],
)
def test_stages_by_name_and_from_the_end(stages):
  spec = weights.read_spec({**CONFIG, **_with_backbone(**stages)}, [])
  assert spec.layers == (0, 1, 2, 3)


@pytest.mark.slow
def test_a_folder_is_an_encoder_with_a_depth_head(folder):
  """Its maps are the expert's, of inputs of any shape."""
  mesh = mesh_of(1)
  encoder = mtv_jax.load(folder, mesh=mesh)
  preprocess = encoder.preprocess
  assert (preprocess.size, preprocess.resize) == (42, "squash")
  normal = np.float32([preprocess.mean, preprocess.std])
  np.testing.assert_array_equal(normal, [MEAN, STD])
  assert encoder.can_predict("depth")
  assert encoder.image(np.zeros((1, 9, 9, 3), np.uint8)).pooled.shape == (1, 16)
  expert = depth_anything.load_expert(folder, mesh=mesh, size=28)
  image = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
  pixels = expert.prepare(image, {}).arrays["images"]
  assert pixels.shape == (28, 42, 3)
  want = np.asarray(expert.run({"images": pixels[None]})["depth"])
  got = encoder.depth([(pixels * STD + MEAN) * 255], resize=False)
  assert got.shape == (1, 28, 42)
  assert want.min() > 0 and want.std() > 0.05 * want.mean()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="nearest valid size is 28x42"):
    encoder.depth([pixels[:-1]], resize=False)
  assert encoder.depth([image]).shape == (1, 42, 42)


def test_defaults_on_accelerators(folder, monkeypatch):
  """bfloat16 and full batches of one shape; options take precedence."""
  open_expert = functools.partial(
    depth_anything.load_expert, folder, mesh=mesh_of(2), size=28
  )
  names = ("dtype", "batch_size", "preprocess", "side", "bits")

  def settings(**options):
    return [open_expert(**options).settings.get(name) for name in names]

  assert settings() == ["float32", 1, "original", 96, 10]
  old = settings(side=128, bits=16)
  assert old == ["float32", 1, "original", 128, None]
  monkeypatch.setattr(base, "is_accelerator", lambda mesh: True)
  assert settings() == ["bfloat16", 16, "square", 96, 10]
  assert open_expert().rows == 32
  given = dict(dtype="float32", batch_size=1, preprocess="original")
  assert settings(**given, side=128, bits=16) == old


@pytest.mark.slow
def test_a_photo_becomes_a_label_on_any_number_of_devices(folder):
  """Bit-equal on one device and on eight."""
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (8, 40, 60, 3), np.uint8)
  options = dict(preprocess="square", size=28, side=8)
  record = {"key": "a", "captions": [], "meta": {}}
  depths = []
  for devices in (1, 8):
    expert = depth_anything.load_expert(
      folder, mesh=mesh_of(devices), **options
    )
    assert isinstance(expert, Expert) and expert.kind == "depth"
    assert expert.rows == devices
    items = [expert.prepare(image, record) for image in images]
    assert {item.group for item in items} == {(28, 28)}
    pixels = np.stack([item.arrays["images"] for item in items])
    maps = []
    for start in range(0, len(images), expert.rows):
      out = expert.run({"images": pixels[start : start + expert.rows]})
      maps.append(np.asarray(out["depth"]))
    depths.append(np.concatenate(maps))
  np.testing.assert_array_equal(*depths)
  assert depths[0].shape == (8, 28, 28) and (depths[0] > 0).all()
  outcome = expert.finish({"depth": depths[0][3]}, items[3].meta)
  assert isinstance(outcome.label, DepthLabel) and not outcome.counts
  assert outcome.label.values.shape == (8, 8)
  assert outcome.label.low < outcome.label.high
  assert json.loads(json.dumps(expert.settings))["preprocess"] == "square"
  dark = expert.finish({"depth": np.zeros((28, 28), np.float32)}, None)
  assert dark.label is None and sum(dark.counts.values()) == 1


# ---------------------------------------------------------------------------
# Against transformers.


@pytest.fixture(scope="module")
def photos(shared_data):
  """COCO's val2017: one upright, square, wide and very wide."""
  images = [
    canvas.decode(path.read_bytes(), key=path.name)
    for path in sorted((shared_data / "coco" / "val2017").glob("*.jpg"))
  ]

  def nearest(aspect):
    return min(images, key=lambda x: abs(x.shape[1] / x.shape[0] - aspect))

  return [nearest(aspect) for aspect in (0.7, 1.0, 1.5, 2.2)]


def _compare(model, folder, images, **options):
  """The depth maps of both are equal, relative to the largest value."""
  torch = pytest.importorskip("torch")
  expert = depth_anything.load_expert(folder, mesh=mesh_of(1), **options)
  for image in images:
    pixels = expert.prepare(image, {}).arrays["images"][None]
    with torch.no_grad():
      wanted = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    wanted = wanted.predicted_depth.numpy()
    depth = np.asarray(expert.run({"images": pixels})["depth"])
    assert depth.shape == wanted.shape
    assert wanted.min() > 0 and wanted.std() > 0.05 * wanted.mean()
    assert abs(depth - wanted).max() < 1e-4 * abs(wanted).max()


@pytest.mark.reference
def test_small_equals_transformers(tmp_path, photos):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from tools.transformers_experts import randomise

  stages = dict(num_hidden_layers=6, out_indices=[1, 3, 4, 6])
  backbone = _with_backbone(**stages, reshape_hidden_states=False)
  config = transformers.DepthAnythingConfig(**{**CONFIG, **backbone})
  model = transformers.DepthAnythingForDepthEstimation(config).eval()
  randomise(model, torch.Generator().manual_seed(1))
  model.save_pretrained(tmp_path)
  assert len({image.shape for image in photos}) > 2
  _compare(model, tmp_path, photos, size=84)


@pytest.mark.reference
@pytest.mark.parametrize(
  ("variant", "size"),
  [("S", 252), pytest.param("B", 518, marks=pytest.mark.long)],
)
def test_true_shapes_equal_transformers(variant, size, tmp_path, photos):
  pytest.importorskip("transformers")
  from tools.transformers_experts import write_depth_anything

  model = write_depth_anything(variant, tmp_path)
  _compare(model, tmp_path, photos[:1], size=size)
