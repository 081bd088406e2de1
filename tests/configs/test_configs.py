"""Every recipe of configs/ builds, tiny and full, and documents its command."""

import json
import pathlib

import jax
import pytest

from mtv_jax.config import overrides, recipes
from mtv_jax.config.durations import Duration, RunLength
from mtv_jax.convert.tipsv2 import TIPSV2
from mtv_jax.encoder.preprocess import preprocess_from_config
from mtv_jax.train.config import resolve
from mtv_jax.train.run import make_loader, open_run
from mtv_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))
every = pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
# They need a checkpoint: tests/train/test_continuation.py, test_llava.py.
NEED_CHECKPOINT = ("continue_from", "distill", "llava")
WHOLE = [f for f in FILES if f.stem not in NEED_CHECKPOINT]
# Shrunk, a derived recipe differs from its base by a line or two, or shares
# objectives and views with a recipe that is built.
DERIVED = (
  "mtv_l16_256", "mtv_g14_224", "mtv_b16_512", "siglip_l16_256",
  "tips_b16_224", "coco_photos", "study_photos",
  "mtv_photos", "mtv_tiny", "dino_b16_224",
)  # fmt: skip
each_tiny = pytest.mark.parametrize(
  "file",
  [
    pytest.param(f, marks=[pytest.mark.slow] * (f.stem in DERIVED), id=f.stem)
    for f in FILES
  ],
)


def test_recipes_are_read_by_name():
  by_name = recipes.read_config("mtv_tiny:tiny,batch=8")
  assert by_name == recipes.read_config(str(ROOT / "configs/mtv_tiny.py:tiny"))
  assert recipes.read_config("mtv_tiny", tiny=True, batch=8) == by_name
  with pytest.raises(ConfigError, match="no config 'mtv_tiy'.*'mtv_tiny'"):
    recipes.read_config("mtv_tiy")


@each_tiny
def test_tiny_needs_nothing_but_the_scenes(file, tmp_path):
  config = recipes.read_config(f"{file}:tiny")
  # Few enough examples for a minute on a laptop's CPU.
  assert config.batch_size * config.total_steps <= 20_000
  assert all(source["type"] == "scenes" for source in config.data.train)
  built = open_run(config, tmp_path)
  assert built.total_steps == config.total_steps
  params = jax.tree.leaves(built.train_step.abstract.params)
  assert sum(leaf.size for leaf in params) < 5_000_000
  with make_loader(built, 0) as loader:
    assert set(built.spec.fields()) <= set(loader.fields)


STAGES = (
  "dinov2_l16:long", "dinov3_l16:gram", "dinov3_l16:highres", "tips_b14:v2",
)  # fmt: skip


@pytest.mark.parametrize("name", [*(file.stem for file in WHOLE), *STAGES])
def test_the_whole_recipe_is_a_config(name):
  config = recipes.read_config(name)
  for entry in config.get("teachers", {}).values():
    if entry.get("path"):  # The folder does not exist here.
      entry.model = dict(variant=config.model.variant)
  config = resolve(config)
  # A written config resolves to an equal one.
  written = json.loads(json.dumps(config.to_dict()))
  assert written == config.to_dict()
  assert resolve(written) == config
  model, built_views = config.parts.model, config.parts.views
  for objective in config.parts.objectives.values():
    for encoding in objective.needs().encodings:
      assert encoding.tower == "text" or encoding.view in built_views
  # Evaluations use the image size that the model was trained at.
  if "image" in built_views:
    assert built_views["image"].size == model.image.image_size
  length = RunLength.of_total(config.total, config.batch_size, 100_000)
  assert length.total_steps > 100


@pytest.mark.parametrize(
  ("recipe", "message"),
  [
    ("dinov3_l16:gram,highres", "two runs, one after the other"),
    ("dinov3_l16:init=runs/a", "init=runs/a is the run that the stages"),
  ],
)
def test_arguments_that_do_not_fit_are_rejected(recipe, message):
  with pytest.raises(ConfigError, match=message):
    recipes.read_config(recipe)


@pytest.mark.parametrize("file", WHOLE, ids=lambda f: f.stem)
def test_real_data_demand_a_tokenizer(file, tmp_path):
  config = recipes.read_config(str(file))
  sources = {source["type"] for source in config.data.train}
  if not config.model.get("text") or sources == {"scenes"}:
    return
  assert config.model.text.tokenizer == ""
  config.mesh = dict(data=-1)
  with pytest.raises(ConfigError, match=":tokenizer=PATH"):
    open_run(config, tmp_path)
  # As published without a file that can be read; else the tokenizer's size.
  missing, unset = rows_of(f"{file}:tokenizer=x.model"), rows_of(str(file))
  assert missing == unset > 30_000
  assert rows_of(f"{file}:tokenizer=bytes") == 258
  assert rows_of(f"{file}:tokenizer=train:99") == 99


def rows_of(recipe):
  """The embedding rows of a recipe's text tower."""
  return resolve(recipes.read_config(recipe)).parts.model.text.vocab_size


@pytest.mark.parametrize(
  ("arguments", "rows"),
  [("", 144), (":tokenizer=bytes", 258), (":tokenizer=a.json,vocab=120", 120)],
)
def test_captioning_has_rows_for_its_tokenizer(arguments, rows):
  assert rows_of(f"captioning_scenes{arguments}") == rows


@every
def test_it_reads_as_a_recipe(file):
  text = file.read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 150
  docstring = text.split('"""')[1]
  assert f"--config=configs/{file.name}" in docstring
  assert "python -m mtv_jax.main" in docstring
  assert "Hardware" in docstring


@pytest.mark.parametrize(
  ("name", "rate", "base", "power"),
  [
    ("dinov2_l16", 4e-3, 1024, 0.5),
    ("dino_b16_224", 4e-3, 1024, 0.5),
    ("mae_b16_224", 1.5e-4, 256, 1),
  ],
)
def test_the_rate_follows_the_batch_size_whatever_way_it_is_set(
  name, rate, base, power
):
  config = recipes.read_config(name)
  for batch in (config.batch_size, 96):
    resolved = resolve(recipes.read_config(name, batch=batch))
    override = overrides.override(config, [f"batch_size={batch}"])
    assert resolved == resolve(override)
    wanted = pytest.approx(rate * (batch / base) ** power)
    assert resolved.optim.scale_lr(resolved.batch_size) == wanted


@pytest.mark.parametrize(
  ("name", "shape", "size"),
  [("siglip_b16_224", "B", 224), ("siglip_l16_256", "L", 256)],
)
def test_siglip_is_trained_as_published(name, shape, size):
  """Batch 32,768, rate 1e-3, 20k warm-up steps (Zhai et al. 2023)."""
  config = resolve(recipes.read_config(name))
  image = config.model.spec.image
  assert (image.width, image.depth) == {"B": (768, 12), "L": (1024, 24)}[shape]
  assert (image.patch_size, image.image_size) == (16, size)
  assert config.batch_size == 32_768 and config.optim.lr == 1e-3
  assert config.total == Duration(40e9, "examples")
  assert config.optim.weight_decay * config.optim.lr == pytest.approx(1e-4)
  length = RunLength.of_total(config.total, config.batch_size)
  warmup = length.steps(config.schedule.warmup)
  assert warmup == pytest.approx(20_000, rel=0.02)


@pytest.mark.parametrize(
  ("name", "size"),
  [
    ("siglip_b16_224", 224),
    ("siglip_l16_256", 256),
    ("siglip_lit_b16_224", 224),
    ("siglip2_b16_256", 256),
  ],
)
def test_siglip_resizes_as_big_vision_on_demand(name, size):
  for tiny, side in (("", size), ("tiny,", 32)):
    config = resolve(recipes.read_config(f"{name}:{tiny}antialias=False"))
    ops = f"decode|canvas({side}, antialias=False)|caption(64)"
    assert config.data.ops.startswith(ops)
    assert config.views["image"].ops == f"resize({side})"
    evaluated = preprocess_from_config(config.model, config.views)
    assert (evaluated.size, evaluated.antialias) == (side, False)


def test_siglip_takes_the_optimizer_of_its_paper(tmp_path):
  """Adafactor (section 4), whose second moments are factored."""
  config = overrides.override(
    recipes.read_config("siglip_b16_224:tiny"), ["optim.name=adafactor"]
  )
  state = open_run(config, tmp_path).train_step.abstract
  paths = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
  assert any("v_row" in jax.tree_util.keystr(path) for path, _ in paths)


def test_stages_of_dinov3_start_as_published():
  """From the student, and high resolution from the Gram run's teacher."""
  for stage, weights in (("gram", "student"), ("highres", "teacher")):
    init = recipes.read_config(f"dinov3_l16:{stage}").init
    assert init.weights == weights and init.teacher


@pytest.mark.parametrize(
  ("arguments", "batch", "steps", "crops"),
  [("", 16_384, 495_605, 8), (":v2", 8192, 90_000, 6)],
)
def test_tips_is_trained_as_published(arguments, batch, steps, crops):
  """70 epochs of 116M images at 16k; TIPSv2: 90,000 steps, 6 local crops."""
  config = resolve(recipes.read_config(f"tips_b14{arguments}"))
  length = RunLength.of_total(config.total, config.batch_size)
  assert (config.batch_size, length.total_steps) == (batch, steps)
  built = config.parts.views
  assert (built["local"].count, built["local"].size) == (crops, 98)
  assert built["masked"].max_masked == round(0.75 * 256)
  weights = [
    config.objectives[name].weight for name in ("contrastive", "dino", "ibot")
  ]
  assert weights == [1.0, 1.0, 2.0]
  assert config.parts.objectives["ibot"].prototypes == 32_768
  # The text tower of TIPS's code, which is TIPSv2's.
  assert TIPSV2.unsupported_fields(config.parts.model) == []
