"""Exports of recipes and published layouts, opened by their own classes.

    pytest tests/convert/test_matrix.py -m "" -s

prints the differences of docs/conversion.md. A layout is a tiny model of random
weights with the image processor that its publisher saved. From a JPEG file, its
features are the library's; so are those of its export, also after
`continue_from`, from the export's own processor. One process without mtv_jax
opens all folders.
"""

import json
import pathlib
import subprocess
import sys
import threading

import jax
import library_process
import numpy as np
import PIL.Image
import pytest
import tower_parity as parity
from convert import test_families as families
from convert import test_foreign_layouts as foreign

import mtv_jax
from mtv_jax import configs
from mtv_jax.cli.main import run_command
from mtv_jax.cli.train import train
from mtv_jax.config import sections
from mtv_jax.config.recipes import read_config
from mtv_jax.convert import huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess, preprocess_from_config
from mtv_jax.models.two_tower import ModelConfig
from mtv_jax.parallel.mesh import make_mesh

# Deprecations inside transformers and timm.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
long, reference = pytest.mark.long, pytest.mark.reference

# Recipes and layouts.
IN_CI = ("clip_b16_224", "mae_b16_224", "tips_b14", "dinov3_l16", "mtv_tiny")
IN_CI += ("siglip_14_384", "dinov3", "pe_core")
TIMEOUT = 300  # Seconds of a call of `embed`.


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
  """`library_process.embed`, in a process without mtv_jax."""
  result = tmp_path_factory.mktemp("embed") / "a.npz"
  with subprocess.Popen(
    [sys.executable, library_process.__file__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:

    def call(*arguments):
      line = json.dumps([*map(str, arguments), str(result)])
      print(line, file=process.stdin, flush=True)
      timer = threading.Timer(TIMEOUT, process.kill)  # Ends `readline`.
      timer.daemon = True
      timer.start()
      reply = process.stdout.readline().strip()
      timer.cancel()
      assert reply == str(result)
      with np.load(result) as arrays:
        return arrays["pixels"], arrays["pooled"]

    yield call
    process.stdin.close()


# ---------------------------------------------------------------------------
# Recipe x class.

CLASSES = {
  "CLIPModel": ("clip_b16_224",),
  "Dinov2Model": ("dino_b16_224", "dinov2_l16", "distill", "mae_b16_224"),
  "DINOv3ViTModel": ("dinov3_l16",),
  "SiglipVisionModel": ("llava",),
  "Tipsv2Model": ("tips_b14", "tips_b16_224"),
}
NAMES = sorted(
  path.stem
  for path in pathlib.Path(configs.__path__[0]).glob("*.py")
  if not path.stem.startswith("_")
)


@pytest.mark.parametrize(
  "is_opened", [False, pytest.param(True, marks=[long, reference])]
)
@pytest.mark.parametrize(
  "name", [n if n in IN_CI else pytest.param(n, marks=long) for n in NAMES]
)
def test_recipes_are_exported(name, is_opened, request, tmp_path):
  config = read_config(name, tiny=True)
  section = sections.read(ModelConfig, config.model.to_dict(), "config.model")
  heads = {"logit_scale": np.float32(2.5)}
  if config.objectives.get("contrastive", {}).get("loss_type") != "softmax":
    heads["logit_bias"] = np.float32(-3.0)
  params = parity.random_params(section.spec)
  if section.spec.text is not None:
    params["heads"] = {"contrastive": heads}
  views = config.get("views", {})
  preprocess = preprocess_from_config(section, dict(views)).to_dict()
  model = ConvertedModel(section.spec, params, preprocess).store_positions()
  folder = huggingface.write(tmp_path / "a", model)
  back = huggingface.read(folder)
  assert (back.spec, back.preprocess) == (model.spec, preprocess)
  parity.assert_same_params(back.params, model.params)
  kinds = [kind for kind, names in CLASSES.items() if name in names]
  kind = kinds[0] if kinds else "SiglipModel"
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == [kind]
  if is_opened:
    side = model.spec.image.image_size
    images = parity.pixels(2, side, side)
    np.save(tmp_path / "a.npy", images)
    embed = request.getfixturevalue("embed")
    _, theirs = embed(folder, kind, tmp_path / "a.npy")
    ours = parity.run_image(model, images).pooled
    worst = parity.largest_difference({"pooled": (ours, theirs)})
    print(f"{name}: {kind}, {worst:.1e}")


# ---------------------------------------------------------------------------
# Published layout x class, from a JPEG file.

MLP, TOWER = families.MLP, families.TOWER
SIZE = {"height": 64, "width": 64}
CROP = {"size": {"shortest_edge": 73}, "crop_size": SIZE}
PIXELS = {"do_normalize": False, "do_center_crop": False, "size": SIZE}
# The sizes of transformers' own tests, tests/models/*/test_modeling_*.py; ViTs
# have 64 instead of 37: their exports have DINOv2's integer `mlp_ratio`.
TESTED = parity.tower(32, 2, 4, 37, image_size=30, patch_size=2)
DINOV2 = {k: v for k, v in TESTED.items() if k != "intermediate_size"}
TEXT = parity.tower(32, 2, 4, 37, vocab_size=99, eos_token_id=2)
VIT = {**TESTED, "intermediate_size": 64}
MAE = {f"decoder_{k}": v for k, v in parity.tower(32, 2, 4, 37).items()} | VIT
SMALL = {"height": 30, "width": 30}
SMALL_CROP = {"size": {"shortest_edge": 34}, "crop_size": SMALL}
# By name: class, config, image processor, its options.
LAYOUTS = {
  # So400m/14-384: six pixels fill no patch.
  "siglip_14_384": (
    "SiglipVisionModel", {**MLP, "image_size": 62, "patch_size": 14},
    "SiglipImageProcessorPil", {"size": {"height": 62, "width": 62}},
  ),
  "siglip_fast": (
    "SiglipVisionModel", TESTED, "SiglipImageProcessor", {"size": SMALL},
  ),
  "siglip2_naflex": (
    "Siglip2VisionModel", {**TESTED, "num_patches": 16},
    "Siglip2ImageProcessorPil", {"patch_size": 2, "max_num_patches": 24},
  ),
  "clip": ("CLIPVisionModel", TESTED, "CLIPImageProcessorPil", SMALL_CROP),
  "clip_projected": (
    "CLIPVisionModelWithProjection", {**TESTED, "projection_dim": 32},
    "CLIPImageProcessorPil", SMALL_CROP,
  ),
  "metaclip_2": (
    "MetaClip2Model",
    {"vision_config": TESTED, "text_config": TEXT, "projection_dim": 64},
    "CLIPImageProcessorPil", SMALL_CROP,
  ),
  "vit": ("ViTModel", VIT, "ViTImageProcessorPil", {"size": SMALL}),
  "deit": (
    "DeiTModel", VIT, "DeiTImageProcessorPil",
    {**SMALL_CROP, "size": {"height": 34, "width": 34}},
  ),
  "mae": ("ViTMAEForPreTraining", MAE, "ViTImageProcessorPil", {"size": SMALL}),
  "ijepa": ("IJepaModel", TESTED, "ViTImageProcessorPil", {"size": SMALL}),
  "dinov2": ("Dinov2Model", DINOV2, "BitImageProcessorPil", SMALL_CROP),
  # A processor of another size, as in published DINOv2s.
  "dinov2_518_224": (
    "Dinov2Model", {**TOWER, "image_size": 112},
    "BitImageProcessorPil", CROP,
  ),
  "dinov2_registers": (
    "Dinov2WithRegistersModel", {**DINOV2, "num_register_tokens": 2},
    "BitImageProcessor", SMALL_CROP,
  ),
  "dinov3": (
    "DINOv3ViTModel", {**TESTED, "num_register_tokens": 2},
    "DINOv3ViTImageProcessor", {"size": SMALL},
  ),
  "aimv2": ("Aimv2VisionModel", TESTED, "CLIPImageProcessorPil", SMALL_CROP),
  "radio": ("RadioModel", families.RADIO, "CLIPImageProcessorPil", PIXELS),
  "tipsv2": (
    "Tipsv2VisionModel", families.TIPS, "Tipsv2ImageProcessor", {"size": SIZE},
  ),
  "open_clip": ("CLIP", {"embed_dim": 40, **foreign.OPEN_CLIP["openai"]}),
  # Two forms of timm's transform; PE-Core has a projection, and here two MLPs
  # of equal width, which is not timm's default.
  "pe_core": (
    "vit_pe_core_tiny_patch16_384",
    {"img_size": 64, "num_classes": 24}
    | {"mlp_ratio": 2, "attn_pool_mlp_ratio": 2},
    "center", 0.9,
  ),
  "pe_spatial": (
    "vit_pe_spatial_tiny_patch16_512", {"img_size": 64}, "squash", 1.0,
  ),
  "timm_dinov2": (
    "vit_small_patch14_reg4_dinov2", {"img_size": 70, "embed_dim": 96},
    "center", 1.0,
  ),
  "timm_dinov3": (  # Pools patches, which the class does not.
    "vit_small_patch16_dinov3", {"img_size": 64, "embed_dim": 96},
    "center", 1.0,
  ),
  "timm_siglip": (
    "vit_base_patch16_siglip_224", {"img_size": 64, "embed_dim": 96},
    "center", 0.875,
  ),
}  # fmt: skip
# Classes of exports that are not the publisher's.
EXPORTED = {
  **foreign.VITS,
  "vit_small_patch14_reg4_dinov2": "Dinov2WithRegistersModel",
  "vit_small_patch16_dinov3": "DINOv3ViTModel",
  "vit_base_patch16_siglip_224": "SiglipVisionModel",
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
  pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
  path = tmp_path_factory.mktemp("photo") / "a.jpg"
  PIL.Image.fromarray(pixels).resize((131, 97)).save(path, quality=90)
  return path


def save_layout(folder, class_name, config, processor=None, options=None):
  """Saves the publisher's folder."""
  if class_name == "CLIP":
    folder.mkdir()
    foreign.save_open_clip(folder, config)
    return
  if class_name.startswith("vit_"):
    folder.mkdir()
    families.save_timm(
      folder,
      class_name,
      config={"crop_mode": processor, "crop_pct": options},
      **config,
    )
    return
  import transformers

  parity.save_model(folder, class_name, **config)
  kind = getattr(transformers, processor)
  kind(**options).save_pretrained(folder)
  path = folder / "preprocessor_config.json"
  if processor in ("SiglipImageProcessor", "BitImageProcessor"):
    # transformers 5 saves torchvision's class under the name of Pillow's.
    text = path.read_text().replace('Processor"', 'ProcessorFast"')
    path.write_text(text)


def continued(folder, params):
  """The model of a run of `continue_from`."""
  config = loading.read_model_info(folder).model_config()
  section = sections.read(ModelConfig, config, "config.model")
  preprocess = preprocess_from_config(section, {}).to_dict()
  return ConvertedModel(section.spec, params, preprocess)


@reference
@pytest.mark.parametrize(
  "name",
  [n if n in IN_CI else pytest.param(n, marks=long) for n in LAYOUTS],
)
def test_layouts_are_exported_with_their_pixels(name, photo, embed, tmp_path):
  pytest.importorskip("torchvision")
  pytest.importorskip("timm")
  class_name, *_ = layout = LAYOUTS[name]
  save_layout(tmp_path / "a", *layout)
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  encoder = mtv_jax.load(tmp_path / "a", mesh=mesh)
  model = huggingface.read(tmp_path / "a")
  is_native = encoder.preprocess.resize == "native"
  ours = encoder.preprocess(PIL.Image.open(photo))
  if is_native:
    ours = encoder.preprocess.patches(PIL.Image.open(photo))["patches"]
  pooled = encoder.image([photo]).pooled
  is_open_clip = class_name == "CLIP"
  write = huggingface.write_open_clip if is_open_clip else huggingface.write
  folder = write(tmp_path / "b", model)
  kind = EXPORTED.get(class_name, class_name)
  for path, opened in ((tmp_path / "a", class_name), (folder, kind)):
    pixels, want = embed(path, opened, photo)
    if not is_native:
      pixels = pixels[: ours.shape[0], : ours.shape[1]]
    if name == "radio" and path != folder:  # Normalises in the model.
      mean, std = map(
        np.float32, (encoder.preprocess.mean, encoder.preprocess.std)
      )
      pixels = (pixels - mean) / std
    worst = float(np.abs(pixels - ours).max())
    assert worst <= (3e-5 if "dinov3" in name else 1e-6)
    features = parity.largest_difference({"pooled": (pooled, want)})
    print(f"{name}, {path.name}: pixels {worst:.1e}, pooled {features:.1e}")
  # Read again, with and without our description, and continued.
  for change in ("none", "description", "continued"):
    if change == "description" and kind != class_name:
      continue  # Another class's options: a mask token, a layer scale.
    if change == "description":
      (folder / "mtv_jax.json").unlink()
    back = huggingface.read(folder)
    if change == "continued":
      back = continued(tmp_path / "a", model.params)
    assert back.spec == model.spec
    parity.assert_same_params(back.params, model.params)
    got, want = (
      Preprocess.from_dict(m.preprocess).to_dict() for m in (back, model)
    )
    if change == "none" or name != "radio":  # Its processor is rounded.
      assert got == want
  again = write(tmp_path / "c", back)
  for file in (*folder.glob("*.safetensors"), *folder.glob("*config.json")):
    assert (again / file.name).read_bytes() == file.read_bytes(), file


@long
@reference
@pytest.mark.parametrize(
  "name", [n for n in LAYOUTS if n not in ("metaclip_2", "open_clip")]
)
def test_layouts_are_trained_and_exported(name, photo, embed, tmp_path):
  """The library's features of a continued run's export are the run's."""
  class_name, *_ = layout = LAYOUTS[name]
  save_layout(tmp_path / "a", *layout)
  (tmp_path / "data").mkdir()
  for i in range(8):
    rotated = PIL.Image.open(photo).rotate(45 * i)
    rotated.save(tmp_path / "data" / f"{i}.png")
  options = "images_only,batch=8,steps=2,lr=0.01,dtype=float32,prototypes=16"
  paths = f"path={tmp_path / 'a'},data={tmp_path / 'data'}"
  config = read_config(f"continue_from:{paths},{options}")
  config.evals = {}
  train(config, tmp_path / "run")
  folder = tmp_path / "b"
  run_command("convert", ["to_hf", str(tmp_path / "run"), str(folder)])
  _, want = embed(folder, EXPORTED.get(class_name, class_name), photo)
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  start, got = (
    mtv_jax.load(tmp_path / path, mesh=mesh).image([photo]).pooled
    for path in ("a", "run")
  )
  worst = parity.largest_difference({"pooled": (got, want)})
  print(f"{name}: pooled {worst:.1e}, trained by {np.abs(got - start).max()}")
  assert np.abs(got - start).max() > 1e-3


@reference
def test_a_perception_encoder_without_timms_config(photo, tmp_path):
  """The publisher's transform: a bilinear squash."""
  transforms = pytest.importorskip("torchvision.transforms")
  save_layout(tmp_path / "a", *LAYOUTS["pe_spatial"])
  path = tmp_path / "a" / "config.json"
  config = json.loads(path.read_text())
  del config["pretrained_cfg"]
  path.write_text(json.dumps(config))
  fields = huggingface.read(tmp_path / "a").preprocess
  image = PIL.Image.open(photo)
  resize = transforms.Resize((64, 64))  # PIL's bilinear.
  want = transforms.functional.to_tensor(resize(image)) * 2 - 1
  got = Preprocess.from_dict(fields)(image).transpose(2, 0, 1)
  np.testing.assert_allclose(got, want.numpy(), atol=1e-6)


STAGES = dict(neck_hidden_sizes=[8, 12, 16, 20], fusion_hidden_size=16)
DENSE = {
  "DepthAnythingForDepthEstimation": (
    "dinov2", {"patch_size": 16, "reassemble_hidden_size": 48},
  ),
  "Tipsv2DptForDensePrediction": (
    "tipsv2_vision_model", {"num_depth_bins": 10, "num_labels": 5},
  ),
}  # fmt: skip


@reference
@pytest.mark.parametrize("class_name", DENSE)
def test_dense_heads_are_exported(class_name, tmp_path):
  kind, options = DENSE[class_name]
  backbone = {**TOWER, "num_hidden_layers": 4, "mlp_ratio": 2}
  backbone |= dict(model_type=kind, out_indices=[1, 2, 3, 4])
  backbone |= dict(apply_layernorm=True, reshape_hidden_states=False)
  options = {**options, **STAGES, "backbone_config": backbone}
  theirs = parity.save_model(tmp_path / "a", class_name, scale=0.02, **options)
  model = huggingface.read(tmp_path / "a")
  folder = huggingface.write(tmp_path / "b", model)
  for _ in range(2):
    back = huggingface.read(folder)
    assert back.spec == model.spec
    assert back.prediction_heads == model.prediction_heads
    parity.assert_same_params(back.params, model.params)
    (folder / "mtv_jax.json").unlink(missing_ok=True)
  opened = library_process.load_model(folder, class_name)
  pixels = parity.as_torch(parity.pixels(1, 48, 80))
  got, want = opened(pixels), theirs(pixels)
  assert got.keys() == want.keys()
  assert all((got[name] == value).all() for name, value in want.items())
  # A head with norms of its own is only ours.
  head = next(iter(model.params["heads"].values()))
  head["norm1"] = {k: v + 1 for k, v in head["norm1"].items()}
  folder = huggingface.write(tmp_path / "c", model)
  assert json.loads((folder / "config.json").read_text())["model_type"] == kind


@reference
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_roundings_of_libraries(method, photo):
  """torchvision's pixels are identical, DINOv3's nearly; Pillow's differ."""
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("torchvision.transforms.v2.functional")
  pixels = np.array(PIL.Image.open(photo))
  options = dict(interpolation=method, mean=(0.0,) * 3, std=(1.0,) * 3)
  pillow = Preprocess(48, **options)
  for rounding in ("torchvision", "none"):
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    tensor = tensor if rounding == "torchvision" else tensor.float()
    mode = functional.InterpolationMode[method.upper()]
    theirs = functional.resize(tensor, (48, 48), mode, antialias=True)
    ours = Preprocess(48, rounding=rounding, **options)
    theirs = theirs.permute(1, 2, 0).numpy() / 255
    worst = np.abs(ours(pixels) - theirs).max() * 255
    assert worst <= (1e-4 if rounding == "torchvision" else 1e-2)
    levels = np.abs(pillow(pixels) - theirs).max() * 255
    print(f"{method}, {rounding}: Pillow differs by {levels:.1f} levels")
    assert 0.5 < levels < 10
