"""The study's recipe: objectives, held-out scenes, cache."""

import functools
import itertools
import operator
import re
from unittest import mock

import pytest

from mtv_jax.config import recipes
from mtv_jax.config.overrides import list_differences
from mtv_jax.configs import _multi_task
from mtv_jax.data import tokenizers
from mtv_jax.evals.datasets.scenes import HELD_OUT_SCENES, PROBE_SCENES
from mtv_jax.hooks.evaluation import PICTURES, build_evaluators
from mtv_jax.objectives import REGISTRY
from mtv_jax.studies.arms import GROUPS
from mtv_jax.train.config import EvalConfig, resolve
from mtv_jax.utils.errors import ConfigError


def read(arg):
  return resolve(recipes.read_config(f"study:{arg}"))


def test_every_objective_and_evaluation():
  config = read("tiny")
  assert {entry.type for entry in config.objectives.values()} == {
    kind for kind, cls in REGISTRY.items() if (cls.group or kind) in GROUPS
  } - {"captioning", "gram", "lejepa"}
  evaluators = build_evaluators(config.evals)
  assert {"zero_shot", "retrieval", "relative_depth"} < {*evaluators}
  # Training draws sheets, of as many images as the config says if it does.
  assert evaluators["retrieval"].pictures == PICTURES
  entry = EvalConfig(type="retrieval", options={"pictures": 0})
  assert build_evaluators({"a": entry})["a"].pictures == 0


def test_recipes_have_the_terms_of_recipes_md(repo_root, monkeypatch):
  """Three recipes call `set_terms`, and keep what it sets."""
  set_terms = mock.Mock(wraps=_multi_task.set_terms)
  monkeypatch.setattr(_multi_task, "set_terms", set_terms)
  names = ("study", "study_photos:tiny", "mtv_b16_224")
  configs = [resolve(recipes.read_config(n)).to_dict() for n in names]
  assert set_terms.call_count == 3
  table = (repo_root / "docs/study/recipes.md").read_text()
  for term, path in {
    "loss_type": "objectives/contrastive",
    "koleo_weight": "objectives/dino",
    "init_bias": "objectives/grounding",
    "regions": "objectives/grounding",
    "warmup_percent": "schedule",
    "momentum": "teacher",
  }.items():
    cells = re.search(rf"^\| `{term}` \|(.*)", table, re.M)[1].split("|")
    scenes, photos, pod = (cell.strip() for cell in cells[:3])
    for config, text in zip(
      configs, (scenes, photos.replace("=", scenes), pod), strict=True
    ):
      value = functools.reduce(operator.getitem, path.split("/"), config)[term]
      assert text == (
        value if value in ("softmax", "sigmoid") else f"{value:g}"
      )


def test_recipes_differ_in_the_keys_of_recipes_md(repo_root):
  """A difference is in a row, or follows from size, data or machine."""
  heads = "prototypes|hidden|bottleneck|chunk|teacher_temp(_start)?"
  rows = {
    "`weights`": r"objectives\.\w+\.weight|objectives\.(mae|depth)|views\.mae",
    "`loss_type`": r"objectives\.contrastive\.loss_type",
    "`init_bias`": r"objectives\.(contrastive|grounding)\.init_bias",
    "`koleo_weight`": r"objectives\.dino\.koleo_weight",
    "`optim`": r"optim\.(name|lr|weight_decay)",
    "`warmup_percent`": r"schedule\.warmup_percent",
    "`momentum`": r"teacher\.momentum",
    "`prototypes`": rf"objectives\.(dino|ibot)\.({heads})",
    "`regions`": r"objectives\.grounding\.regions",
    "`decoder`, `depth_head`": r"objectives\.depth\.(\w+_)?(features|channels)",
    "`same_crop`": r"objectives\.dino\.same_crop",
    "views: image, patch": r"views\.(image|mae)\.ops|model\.image_size",
    "views: global crop": r"views\.global\.ops",
    "views: local crops": r"views\.local\.(count|ops)",
    "views: colours": r"views\.(global|local)\.ops",
    "views: masks": r"views\.global\.ops",
    "`model.init`": r"model\.init",
    "`model.text.clean`": r"model\.text\.clean",
    "`data.shuffle`": r"data\.shuffle",
    "`interference`, `log.gradients_steps`": r"interference|log\.gradients_\w+",
  }
  table = (repo_root / "docs/study/recipes.md").read_text()
  assert re.findall(r"^\| ([`v].*?) \|", table, re.M) == [*rows]
  follows = [
    r"batch_size|total_\w+|data\.ops|data\.train\[0\]\..*|evals\..*",
    r"model\.(text\.)?(variant|depth|heads|mlp_dim|width)|model\.(dtype|remat)",
    r"model\.text\.(length|vocab_size|tokenizer)",
    r"checkpoint\.\w+|log\.every_steps",
  ]
  names = ("study", "study_photos", "mtv_b16_224")
  configs = [resolve(recipes.read_config(n)).to_dict() for n in names]
  pairs = itertools.combinations(configs, 2)
  keys = {key for pair in pairs for key, _ in list_differences(pair)}
  is_key = re.compile("|".join([*rows.values(), *follows])).fullmatch
  assert not {key for key in keys if not is_key(key)}
  for name, pattern in rows.items():
    assert any(re.fullmatch(pattern, key) for key in keys), name


def test_scenes_of_splits_and_training_are_disjoint():
  ranges = [(0, read("tiny=False").data.train[0]["length"])]
  # Ranges of further recipes, and of the attempts at a world.
  ranges += [(HELD_OUT_SCENES, 1), (3_000_000, 1), (5_000_000, 1)]
  for split in ("validation", "test"):
    for entry in read(f"split={split}").evals.values():
      for data in filter(None, map(entry.options.get, ("data", "train"))):
        first, length = data["first"], data["length"]
        ranges += [(first, length), (first + PROBE_SCENES, length)]
  starts = sorted({first for first, _ in ranges})
  assert len(starts) == 8
  assert max(length for _, length in ranges) < min(
    b - a for a, b in zip(starts, starts[1:], strict=False)
  )
  with pytest.raises(ConfigError, match="split=tests: expected one of"):
    read("split=tests")


def test_settings_have_a_cache_of_their_own():
  folders = {
    read(f"cache=scenes{more}").data.train[0]["cache"]
    for more in ("", ",size=64", ",difficulty=medium", ",images=900")
  }
  assert folders == {
    "scenes/easy-48-30000", "scenes/easy-64-30000",
    "scenes/medium-48-30000", "scenes/easy-48-900",
  }  # fmt: skip
  assert "cache" not in read("batch=16").data.train[0]


def test_the_vocabulary_has_the_words():
  config = read("tiny")
  tokenizer = tokenizers.build_tokenizer(config.model.text.tokenizer)
  tokenizers.check_vocabulary(tokenizer, config.model.text.vocab_size)
