"""configs/continue_from.py: continues an exported run on new data."""

import dataclasses
import json

import family_specs
import jax
import library_process
import numpy as np
import PIL.Image
import pytest
import tower_parity as parity
import trainings

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.cli.train import train
from mtv_jax.config import recipes
from mtv_jax.convert import huggingface, native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.registry import build_source
from mtv_jax.encoder import loading
from mtv_jax.evals import run as evals_run
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.train.config import resolve
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.rollback import BoundError
from mtv_jax.train.run import open_run
from mtv_jax.utils import plots
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

_OPTIONS = "dtype=float32,batch=8,steps=4,lr=0.01,prototypes=16,bound=0.0"
_RETRIEVAL = dict(
  type="retrieval", data=dict(type="scenes", size=16, length=12)
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A run of the smallest config, as a Hugging Face folder."""
  root = tmp_path_factory.mktemp("continuation")
  config = recipes.read_config(f"{trainings.CONFIG}:steps=2,save=2")
  config.evals = {}
  config.model.image_mean, config.model.image_std = 0.4, 0.25
  train(config, root / "run")
  huggingface.write(root / "export", loading.read_model(root / "run"))
  return root / "export"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of images with captions beside them."""
  folder = tmp_path_factory.mktemp("photos")
  source = build_source(dict(type="scenes", size=24, length=24, first=500))
  for i in range(24):
    plots.save_image(source[i]["image"], folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(source[i]["captions"][0])
  return folder


def read(start, data, options=""):
  return recipes.read_config(
    f"continue_from:path={start},data={data},{_OPTIONS}{options}"
  )


def leaves(workdir, step, part="params/image"):
  return dict(flatten_with_names(load_tree(workdir, part=part, step=step)))


def drift(workdir, step):
  path = workdir / "evals" / f"drift_{step}.json"
  return json.loads(path.read_text())["evals"]["drift"]["metrics"]


@pytest.mark.slow
def test_all_comes_from_the_checkpoint(start, photos, tmp_path):
  described = loading.read_model_info(start)
  model = loading.read_model(start)
  assert described.spec == model.spec and described.contrast == dict(
    loss_type="sigmoid"
  )
  assert described.preprocess.to_dict() == {**model.preprocess}
  run = open_run(read(start, photos), tmp_path)
  assert run.spec.model == model.spec
  encoder = loading.load(start)
  tokenizer = run.tokenizer
  assert (tokenizer.kind, tokenizer.clean) == ("bytes", "lower")
  config = run.config
  preprocess = loading.preprocess_from_config(config.model, config.views)
  assert preprocess == encoder.preprocess
  assert encoder.preprocess.mean == (0.4,) * 3
  assert config.views["image"].ops.startswith("resize(16, ")
  assert run.spec.heads.keys() == {"contrastive"}

  other = read(start, photos)
  other.model.text.clean = "none"
  message = "encodes .A photo of 2 dogs.*new_tokenizer"
  with pytest.raises(ConfigError, match=message):
    open_run(other, tmp_path)
  other.init.new_tokenizer = True
  open_run(other, tmp_path)
  with pytest.raises(ConfigError, match="path=CHECKPOINT and data="):
    recipes.read_config(f"continue_from:path={start}")


@pytest.mark.slow
def test_images_with_captions(start, photos, tmp_path):
  workdir = tmp_path / "run"
  trainings.train(
    workdir,
    f"--config.evals.retrieval={_RETRIEVAL | dict(at_start=True)}",
    config="continue_from",
    arg=f"path={start},data={photos},{_OPTIONS},features=0.5",
  )
  at_start = drift(workdir, 0)
  assert at_start["neighbours"] == 1
  for name, value in at_start.items():
    assert value == pytest.approx(1, abs=1e-6), name
  assert drift(workdir, 4)["cosine"] < 0.9999
  # The continued model at step 0 is the start, and the last one is exported.
  export = huggingface.write(tmp_path / "a", loading.read_model(workdir))
  evaluators = evals_run.build({"retrieval": _RETRIEVAL})
  measured = []
  for step, folder in ((0, start), (4, export)):
    path = workdir / "evals" / f"retrieval_{step}.json"
    measured.append(json.loads(path.read_text())["evals"]["retrieval"])
    want = evals_run.evaluate(loading.load(folder), evaluators)["retrieval"]
    assert measured[-1]["metrics"] == want.metrics
  assert measured[0]["metrics"] != measured[1]["metrics"]
  # The anchor is the start, and is part of the checkpoint.
  anchor = leaves(workdir, 4, "teachers/start/image")
  source = flatten_with_names(loading.read_model(start).params["image"])
  for name, value in source:
    np.testing.assert_array_equal(anchor[name], value, err_msg=name)
  losses = [row for row in trainings.rows(workdir) if "anchor/loss" in row]
  assert losses[0]["anchor/loss"] == pytest.approx(0, abs=1e-6)
  assert losses[-1]["anchor/loss"] > 1e-7
  assert losses[0]["features/loss"] == pytest.approx(0, abs=1e-6)
  assert losses[-1]["features/loss"] > 1e-3
  # Its weights are an encoder with the start's preprocessing and tokenizer.
  assert loading.load(workdir).preprocess == loading.load(start).preprocess


@pytest.mark.slow
def test_images_alone(start, photos, tmp_path):
  """The tower is frozen while DINO's and iBOT's heads grow.

  Anchors are zero at the start, also if patches of the global crops are masked.
  """
  workdir = tmp_path / "run"
  options = ",images_only,grow=50.0,warmup=0.0,features=1.0"
  config = read(start, photos, f"{options},keep=scenes,keep_share=0.25")
  weights = [(s.get("type"), s["weight"]) for s in config.data.train]
  assert weights == [(None, 0.75), ("scenes", 0.25)]
  config.checkpoint = dict(every_steps=1, keep=9)
  config.log = dict(every_steps=1)
  config.evals.drift.every_percent = None
  config.evals.drift.every_steps = 2
  train(config, workdir)
  source = dict(flatten_with_names(loading.read_model(start).params["image"]))
  for step in (1, 2):
    for name, value in leaves(workdir, step).items():
      if name != "mask_token":
        np.testing.assert_array_equal(value, source[name], err_msg=name)
  heads = [leaves(workdir, step, "params/heads/dino") for step in (1, 2)]
  assert any((heads[0][name] != heads[1][name]).any() for name in heads[0])
  moved = leaves(workdir, 4)
  name = "blocks/mlp/fc1/kernel"
  assert (moved[name] != source[name]).any()
  for step in (0, 2):
    values = drift(workdir, step)
    assert values["neighbours"] == 1
    assert min(values.values()) == pytest.approx(1, abs=1e-6)
  losses = {r["step"]: r for r in trainings.rows(workdir) if "loss" in r}
  for name in ("anchor/loss", "features/loss"):
    assert losses[1][name] < 1e-6 < losses[4][name]


@pytest.mark.slow
def test_naive_continuation_differs_by_its_guards(start, photos, tmp_path):
  naive = resolve(read(start, photos, ",images_only,guards=False"))
  guarded = resolve(read(start, photos, ",images_only"))
  assert not naive.teachers and not naive.optim.rules
  sections = vars(naive).keys() - {"parts"}
  changed = {k for k in sections if getattr(naive, k) != getattr(guarded, k)}
  assert changed == {"objectives", "optim", "schedule", "teachers", "views"}
  state = initialize_state(open_run(naive, tmp_path))
  source = loading.read_model(start).params["image"]
  got = jax.device_get(state.params["image"])
  got.pop("mask_token")
  jax.tree.map(np.testing.assert_array_equal, got, dict(source))


@pytest.mark.slow
def test_coco_photos(start, shared_data, tmp_path):
  """Real photos and COCO's captions, with a bound that ends the run."""
  coco = shared_data / "coco"
  data = coco / "annotations" / "captions_train2017.json"
  options = f",images={coco / 'train2017'},anchor=0.0"
  config = read(start, data, options)
  config.evals.drift.bound = dict(metric="neighbours", min=0.99999)
  config.evals.drift.update(every_percent=None, every_steps=2, count=64)
  config.checkpoint = dict(every_steps=1, keep=9)
  config.optim.lr = 0.1
  workdir = tmp_path / "run"
  messages = []
  for _ in range(2):
    with pytest.raises(BoundError, match="drift/neighbours is") as caught:
      train(config, workdir)
    messages.append(str(caught.value))
  # The second time from the checkpoint of step 1, bit-exactly.
  assert messages[0] == messages[1]
  assert "no checkpoint precedes" in messages[0]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
  """The published layout of DINOv2: 518 pixels, a processor of 224."""
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("dinov2")
  sizes = parity.tower(48, 2, 3, 192, image_size=518, patch_size=14)
  parity.save_model(folder, "Dinov2Model", **sizes)
  transformers.BitImageProcessor(
    size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
  ).save_pretrained(folder)
  return folder


@pytest.mark.long
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_released_dinov2_is_exported_again(dinov2, photos, tmp_path):
  """transformers gives the features of the continued encoder."""
  import torch

  # On one device: eight of them wait for each other for too long.
  options = "images_only,dtype=float32,batch=4,steps=10,lr=0.001,prototypes=16"
  trainings.train(
    tmp_path / "run",
    "--config.evals={}",
    config="continue_from",
    arg=f"path={dinov2},data={photos},{options}",
  )
  folder = huggingface.write(
    tmp_path / "export", loading.read_model(tmp_path / "run")
  )
  for name in ("config.json", "preprocessor_config.json"):
    before, after = (
      json.loads((path / name).read_text()) for path in (dinov2, folder)
    )
    for key in ("image_size", "size", "crop_size"):
      assert after.get(key) == before.get(key)
  encoder = loading.load(folder)
  images = [photos / f"{i}.png" for i in range(3)]
  features = encoder.image(images, layers=(0,))
  model = library_process.load_model(folder, "Dinov2Model")
  pixels = np.stack([encoder.preprocess(PIL.Image.open(x)) for x in images])
  with torch.no_grad():
    expected = model(parity.as_torch(pixels), output_hidden_states=True)
  for ours, theirs in (
    (features.pooled, expected.pooler_output),
    (features.patches.reshape(3, 256, 48), expected.last_hidden_state[:, 1:]),
    (features.layers[0].reshape(3, 256, 48), expected.hidden_states[1][:, 1:]),
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  source = loading.read_params(dinov2)["image"]["blocks"]["mlp"]["fc1"]
  trained = encoder.params["image"]["blocks"]["mlp"]["fc1"]
  assert np.abs(trained["kernel"] - source["kernel"]).max() > 1e-4


@pytest.mark.slow
def test_distillation(start, photos, tmp_path):
  """configs/distill.py: from the folder to an export, whatever the captions."""
  with pytest.raises(ConfigError, match="pass teacher=ORG/NAME and data="):
    recipes.read_config(f"distill:teacher={start}")
  workdir, size = tmp_path / "run", "student=mu/8,res=24,batch=8,steps=12"
  trainings.train(
    workdir,
    "--config.objectives.feature_distillation.statistics_examples=16",
    config="distill",
    arg=f"teacher={start},data={photos},{size},dtype=float32,lr=0.01",
  )
  losses = [row["loss"] for row in trainings.rows(workdir) if "loss" in row]
  assert losses[-1] < losses[0]
  assert drift(workdir, 12).keys() >= {"neighbours", "cka"}
  folder = huggingface.write(tmp_path / "a", loading.read_model(workdir))
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == ["Dinov2Model"]
  assert (config["image_size"], config["patch_size"]) == (24, 8)


@pytest.mark.parametrize("kind", family_specs.SPECS)
def test_every_family_can_be_continued(kind, tmp_path):
  spec = ModelSpec.from_config(family_specs.SPECS[kind])
  model = ConvertedModel(
    spec, parity.random_params(spec), family_specs.preprocess_of(kind)
  )
  start = native.write(tmp_path / "start", model)
  config = recipes.read_config(
    f"continue_from:path={start},data=scenes,images_only,prototypes=16,batch=8"
  )
  run = open_run(config, tmp_path / "run")
  got = run.spec.model.image
  assert (
    dataclasses.replace(got, mask_token=spec.image.mask_token) == spec.image
  )


@pytest.mark.slow
def test_a_branch_equals_a_run_with_its_cooldown(tmp_path):
  """Warm-up, stable rate, then a cool-down that starts from a checkpoint."""

  def run(name, steps, cooldown, **init):
    config = trainings.smallest(f"steps={steps},save=2", evals={})
    config.schedule = dict(name="constant", warmup_steps=1)
    config.schedule.cooldown_steps = cooldown
    if init:
      config.init = dict(path=str(tmp_path / "trunk"), branch=True, **init)
    return jax.device_get(train(config, tmp_path / name))

  run("trunk", 4, 0)
  files = sorted((tmp_path / "trunk").rglob("*"))
  branch, whole = run("branch", 4, 2, step=2), run("whole", 4, 2)
  jax.tree.map(np.testing.assert_array_equal, branch, whole)
  assert sorted((tmp_path / "trunk").rglob("*")) == files
  with pytest.raises(ConfigError, match="from step 4 on, but this run ends at"):
    run("late", 4, 2, step=4)


def test_a_branch_takes_the_whole_state():
  config = trainings.smallest()
  config.init = dict(path="a", branch=True, include=["^image/"])
  with pytest.raises(ConfigError, match="needs config.init.step"):
    resolve(config)
  config.init.step = 2
  with pytest.raises(ConfigError, match="so include has no effect"):
    resolve(config)
