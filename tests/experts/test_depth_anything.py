"""Depth Anything V2: folders, preprocessing, predictions, labels."""

import json

import jax
import numpy as np
import pytest

import mtv_jax
from mtv_jax.convert import depth_anything as weights
from mtv_jax.convert.tables import ConversionError
from mtv_jax.data import canvas
from mtv_jax.data.labels.label_values import DepthLabel
from mtv_jax.experts import depth_anything
from mtv_jax.experts.base import Expert
from mtv_jax.experts.depth_anything import MEAN, STD, DepthPreprocess
from mtv_jax.parallel.mesh import make_mesh
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


# Sizes of both references by (rows, columns), from docs/experts.md.
SIZES = {
  (480, 640): ((518, 686), (518, 686)),
  (768, 1024): ((518, 686), (518, 686)),
  (500, 2000): ((518, 2072), (518, 2072)),
  (384, 512): ((518, 686), (392, 518)),
  (200, 300): ((518, 784), (350, 518)),
  (300, 200): ((784, 518), (518, 350)),
  (518, 518): ((518, 518), (518, 518)),
}


@pytest.mark.parametrize("image", SIZES, ids=str)
def test_sizes_are_the_references(image):
  original, huggingface = SIZES[image]
  assert (
    DepthPreprocess("original", max_aspect=9).resized_shape(*image) == original
  )
  assert (
    DepthPreprocess("huggingface", max_aspect=9).resized_shape(*image)
    == huggingface
  )
  assert DepthPreprocess("square").resized_shape(*image) == (518, 518)


def test_long_images_are_squeezed_and_shapes_are_few():
  inputs = DepthPreprocess()
  assert inputs.resized_shape(500, 2000) == (518, 1036)
  assert inputs.resized_shape(2000, 500) == (1036, 518)
  assert DepthPreprocess("huggingface").resized_shape(100, 4000) == (14, 28)
  rng = np.random.default_rng(0)
  sides = rng.integers(20, 3000, size=(20000, 2))
  shapes = {inputs.resized_shape(*map(int, pair)) for pair in sides}
  assert len(shapes) == 75
  assert all(not side % 14 for shape in shapes for side in shape)


def test_invalid_options_are_rejected():
  with pytest.raises(ValueError, match="nearest is 504"):
    DepthPreprocess(size=500)
  with pytest.raises(ValueError, match="did you mean 'original'|original"):
    DepthPreprocess("orginal")
  with pytest.raises(ValueError, match="max_aspect=0.5"):
    DepthPreprocess(max_aspect=0.5)


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
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (40, 61, 3), np.uint8)
  inputs = DepthPreprocess(size=28)
  height, width = inputs.resized_shape(40, 61)
  wanted = _neighbours(image / 255, height, 0)
  wanted = (_neighbours(wanted, width, 1) - MEAN) / STD
  pixels = inputs(image)
  assert pixels.shape == (28, 42, 3) and pixels.dtype == np.float32
  np.testing.assert_allclose(pixels, wanted, atol=2e-5)


def test_square_is_the_canvas_normalised():
  image = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
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
  stored = _tensors()["neck.reassemble_stage.layers.1.resize.weight"]
  kernel = params["depth"]["reassemble2"]["resize"]["kernel"]
  assert kernel[3, (1 * 2 + 0) * 8 + 5] == stored[3, 5, 1, 0]
  # Ours count fusions from the shallowest, files from the deepest.
  stored = _tensors()[
    "neck.fusion_stage.layers.3.residual_layer1.convolution2.weight"
  ]
  kernel = params["depth"]["fusion1"]["residual1"]["conv2"]["kernel"]
  np.testing.assert_array_equal(kernel, stored.transpose(2, 3, 1, 0))


def test_an_incomplete_folder_names_the_missing_tensors(tmp_path):
  tensors = _tensors()
  lost = "neck.fusion_stage.layers.2.residual_layer2.convolution1.bias"
  del tensors[lost], tensors["backbone.encoder.layer.3.mlp.fc1.weight"]
  with pytest.raises(ConversionError, match="missing") as error:
    weights.read(_write(tmp_path / "a", tensors=tensors))
  assert lost in str(error.value)
  assert "backbone.encoder.layer.3.mlp.fc1.weight" in str(error.value)
  # Unused layers may be in the file, and nothing else.
  tensors = _tensors()
  unused = "neck.fusion_stage.layers.0.residual_layer1.convolution1.bias"
  tensors[unused] = np.zeros(8, np.float32)
  weights.read(_write(tmp_path / "b", tensors=tensors))
  tensors["head.conv4.bias"] = np.zeros(8, np.float32)
  with pytest.raises(ConversionError, match="unexpected") as error:
    weights.read(_write(tmp_path / "b", tensors=tensors))
  assert "head.conv4.bias" in str(error.value)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    weights.read(tmp_path / "nowhere")


BACKBONE = CONFIG["backbone_config"]
WRONG = {
  "metric": {"depth_estimation_type": "metric"},
  "'dinov2_with_registers'": {
    "backbone_config": {**BACKBONE, "model_type": "dinov2_with_registers"}
  },
  "backbone='vit_small'": {"backbone_config": None, "backbone": "vit_small"},
  "apply_layernorm=False": {
    "backbone_config": {**BACKBONE, "apply_layernorm": False}
  },
  "out_indices": {"backbone_config": {**BACKBONE, "out_indices": [0, 1, 2, 3]}},
  "reassemble_factors": {"reassemble_factors": [4, 2, 1, 1]},
  "head_in_index=0": {"head_in_index": 0},
  "patch_size=16": {"patch_size": 16},
  "model_type 'dpt'": {"model_type": "dpt"},
}


@pytest.mark.parametrize("message", WRONG, ids=str)
def test_unsupported_configs_are_rejected(message, tmp_path):
  folder = _write(tmp_path / "a")
  config = {**CONFIG, **WRONG[message]}
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ConversionError) as error:
    weights.read(folder)
  assert message in str(error.value)


def test_stages_may_be_given_by_name():
  backbone = {k: v for k, v in BACKBONE.items() if k != "out_indices"}
  backbone["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
  config = {**CONFIG, "backbone_config": backbone}
  assert weights.read_spec(config, []).layers == (0, 1, 2, 3)
  backbone["out_features"][0] = "stage9"
  with pytest.raises(ConversionError, match="stage9"):
    weights.read_spec(config, [])


@pytest.mark.slow
def test_a_folder_is_an_encoder_with_a_depth_head(folder):
  """Its maps are the expert's, of inputs of any shape."""
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
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
  with pytest.raises(ValueError, match="nearest size that is: 28x42"):
    encoder.depth([pixels[:-1]], resize=False)
  assert encoder.depth([image]).shape == (1, 42, 42)


@pytest.mark.slow
def test_a_photo_becomes_a_label_on_any_number_of_devices(folder):
  """Bit-equal on one device and on eight."""
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (8, 40, 60, 3), np.uint8)
  options = dict(preprocess="square", size=28, side=8)
  record = {"key": "a", "captions": [], "meta": {}}
  depths = []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = make_mesh({"data": -1}, devices)
    expert = depth_anything.load_expert(folder, mesh=mesh, **options)
    assert isinstance(expert, Expert) and expert.kind == "depth"
    assert expert.rows == len(devices)
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

# COCO's val2017, by aspect: upright, square, wide, and one that is very wide.
_ASPECTS = (0.7, 1.0, 1.5, 2.2)


def _photos(shared_data, count):
  """Photos of the aspects above, as near as there are."""
  import PIL.Image

  paths = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))
  aspects = {}
  for path in paths:
    with PIL.Image.open(path) as image:
      aspects[path] = image.width / image.height
  chosen = [
    min(paths, key=lambda p: abs(aspects[p] - aspect))
    for aspect in _ASPECTS[:count]
  ]
  return [canvas.decode(path.read_bytes(), key=path.name) for path in chosen]


def _both(model, folder, images, **options):
  """The largest differences, relative to the largest value, and the maps."""
  torch = pytest.importorskip("torch")
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  expert = depth_anything.load_expert(folder, mesh=mesh, **options)
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
def test_small_equals_transformers(tmp_path, shared_data):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from tools.transformers_experts import randomise

  backbone = transformers.Dinov2Config(
    image_size=70,
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=2,
    out_indices=[1, 3, 4, 6],
    reshape_hidden_states=False,
  )
  config = transformers.DepthAnythingConfig(
    backbone_config=backbone,
    reassemble_hidden_size=32,
    neck_hidden_sizes=[8, 16, 16, 32],
    fusion_hidden_size=16,
    head_hidden_size=8,
  )
  model = transformers.DepthAnythingForDepthEstimation(config).eval()
  randomise(model, torch.Generator().manual_seed(1))
  model.save_pretrained(tmp_path)
  images = _photos(shared_data, 4)
  assert len({image.shape for image in images}) > 2
  _both(model, tmp_path, images, size=84)
  _both(model, tmp_path, images[:1], size=70, preprocess="huggingface")


@pytest.mark.reference
@pytest.mark.parametrize(("variant", "count"), [("S", 2), ("B", 1)])
def test_true_shapes_equal_transformers(variant, count, tmp_path, shared_data):
  pytest.importorskip("transformers")
  from tools.transformers_experts import write_depth_anything

  model = write_depth_anything(variant, tmp_path)
  _both(model, tmp_path, _photos(shared_data, count))


@pytest.mark.reference
def test_huggingface_inputs_equal_its_processors(shared_data):
  """Equal to its Pillow backend, and to torchvision's but for rounding."""
  transformers = pytest.importorskip("transformers")
  options = dict(
    size={"height": 518, "width": 518},
    keep_aspect_ratio=True,
    ensure_multiple_of=14,
    resample=3,
    image_mean=MEAN.tolist(),
    image_std=STD.tolist(),
  )
  pillow = transformers.DPTImageProcessorPil(**options)
  torchvision = transformers.DPTImageProcessor(**options)
  inputs = DepthPreprocess("huggingface", max_aspect=9.0)
  images = _photos(shared_data, 4)
  images.append(images[0][:200, :300])
  for image in images:
    pixels = inputs(image).transpose(2, 0, 1)[None]
    wanted = pillow(images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, wanted, atol=1e-5)
    wanted = torchvision(images=image, return_tensors="np")["pixel_values"]
    # Its weights differ in a byte or two of one value in 150.
    steps = abs(pixels - wanted) * 255 * STD[:, None, None]
    assert steps.max() < 2.01 and (steps > 0.5).mean() < 0.01
