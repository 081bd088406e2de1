"""configs/llava.py: what each stage trains, and answers about images."""

import json
import re
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.cli.train import train
from mtv_jax.config import recipes
from mtv_jax.data.ops import find_op
from mtv_jax.encoder import baselines, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.visual_language import VisualLanguageModel
from mtv_jax.evals.visual_questions import VisualQuestions
from mtv_jax.hooks.evaluation import EvaluationHook
from mtv_jax.train.initialization import initialize_state
from mtv_jax.train.run import open_run
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import flatten_with_names

COLOURS = dict(red=(220, 30, 30), green=(30, 200, 40), blue=(30, 40, 220))
QUESTION = "What colour is it?"
CONNECTOR = "heads/language_model/connector/"
DECODER = "heads/language_model/decoder/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("llava")
  rows = []
  for name, colour in COLOURS.items():
    pixels = np.tile(np.uint8(colour), (32, 32, 1))
    Image.fromarray(pixels).save(root / f"{name}.png")
    human = {"from": "human", "value": f"<image>\n{QUESTION}"}
    turns = [human, {"from": "gpt", "value": name}]
    rows.append(dict(id=name, image=f"{name}.png", conversations=turns))
  (root / "data.json").write_text(json.dumps(rows))
  return root


def read(folder, options):
  data = f"data={folder}/data.json,template=lines,length=32"
  config = recipes.read_config(f"llava:tiny,{data},{options}")
  config.mesh = dict(data=-1)
  return config


def start(folder, options):
  """The parameters of a new run, and the names of those that train."""
  run = open_run(read(folder, options), folder / "unused")
  params = jax.device_get(initialize_state(run).params)
  params = dict(flatten_with_names(params))
  return params, params.keys() - run.spec.frozen


def assert_changed(old, new, *changed):
  """Names in `changed`, and only these, have new values."""
  for name in old.keys() & new.keys():
    is_equal = np.array_equal(old[name], new[name])
    assert is_equal != name.startswith(changed), name


@pytest.mark.long
def test_stages(folder):
  """From random parameters; then a new connector; then adapters."""
  train(read(folder, "stage=2,steps=60,lr=5e-3,batch=16"), folder / "whole")
  whole = dict(flatten_with_names(load_tree(folder / "whole")))
  image = baselines.read_model("random:mu/8@32").params["image"]
  frozen = dict(flatten_with_names({"image": image}))
  assert_changed(frozen, whole)

  model = VisualLanguageModel.load(folder / "whole")
  features = model.encode([folder / f"{name}.png" for name in COLOURS])
  order = [2, 0, 1, 1]
  # A longer question moves the rows of the batch apart.
  questions = [QUESTION] * 3 + [QUESTION + " " * 40]
  answers = model.answer(questions, features, images=order, max_tokens=8)
  assert answers == [[*COLOURS][i] for i in order]
  with pytest.raises(InputError, match="2 questions about 3 images"):
    model.answer([QUESTION] * 2, features, images=[0, 3])
  for question in ("x" * 40, "<image>"):
    with pytest.raises(InputError, match="expected at most 32, and no <image>"):
      model.answer([question], features, images=[0])
  assert model.protocol()["template"] == "lines"
  evaluator = VisualQuestions(data=str(folder / "data.json"), max_tokens=8)
  metrics = dict(evaluator.run(loading.load(folder / "whole")).metrics)
  # Without the image, one answer to the one text; shuffled, all are wrong.
  assert metrics.pop("accuracy_blank") in (0, pytest.approx(1 / 3))
  assert metrics == {"accuracy": 1, "accuracy_shuffled": 0}

  params, trained = start(folder, f"stage=1,language_model={folder}/whole")
  assert_changed(whole, params, CONNECTOR)
  assert all(name.startswith(CONNECTOR) for name in trained)

  params, trained = start(folder, f"stage=2,lora=2,encoder={folder}/whole")
  assert_changed(whole, params)
  added = params.keys() - whole.keys()
  assert added and all(re.match(rf"{DECODER}.*/lora_[ab]$", n) for n in added)
  assert trained == added | {n for n in whole if n.startswith(CONNECTOR)}


@pytest.mark.slow
def test_adapters_are_merged(folder):
  """A run with adapters opens as the model that it trained."""
  options = "stage=2,lora=2,steps=2,lr=0.1,batch=8,remat=none"
  train(read(folder, options), folder / "lora")
  saved = load_tree(folder / "lora")["heads"]["language_model"]["decoder"]
  kernel = "blocks/attention/q/kernel"
  saved = dict(flatten_with_names(saved))
  down, up = (saved[kernel.replace("kernel", f"lora_{x}")] for x in "ab")
  expected = saved[kernel] + 2 * down @ up  # alpha / rank is 2.
  assert not np.allclose(expected, saved[kernel])
  with pytest.raises(ConfigError, match="set layer= and select= as in"):
    read(folder, f"stage=2,encoder={folder}/lora,layer=-1")
  read_again = loading.read_language_model(folder / "lora").params
  opened = VisualLanguageModel.load(folder / "lora").encoder.params["heads"]
  for params in (read_again, opened["language_model"]["decoder"]):
    params = dict(flatten_with_names(jax.device_get(params)))
    assert params.keys() == saved.keys() - {n for n in saved if "/lora_" in n}
    np.testing.assert_allclose(params[kernel], expected, rtol=1e-5, atol=1e-6)


def test_errors(folder):
  for options, message in (
    ("stage=3", "expected 0, 1 or 2"),
    ("tiny,layer=a", "layer=a; expected N or N"),
    ("tiny,layer=1+-1", "needs unique blocks"),
    ("tiny,encoder=pixels:32,select=pooled", "no pooled embedding"),
    ("stage=1", "encoder=CHECKPOINT"),
    (f"encoder=random:mu/8@32,data=x,language_model={folder}", "config.json"),
  ):
    with pytest.raises((ConfigError, InputError), match=message):
      recipes.read_config(f"llava:{options}")
  with pytest.raises(InputError, match="is not a run with the op"):
    VisualLanguageModel.load(folder)
  config = read(folder, "stage=1")
  config.evals = dict(vqa=dict(type="vqa"))
  with pytest.raises(ConfigError, match="can't evaluate a run in training"):
    EvaluationHook().open(open_run(config, folder / "unused"))


def test_templates_without_questions_answer_none(folder):
  """LLaVA's first stage describes images; it has no place for a question."""
  heads = {"language_model": None}
  encoder = mock.Mock(spec=Encoder, prediction_heads=heads)
  model = VisualLanguageModel(encoder, find_op("conversation(9)"))
  for questions, features in (([QUESTION], np.zeros((1, 4, 8))), ([""], None)):
    with pytest.raises(InputError, match="'plain' leaves out questions"):
      model.answer(questions, features)
