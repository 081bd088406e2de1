"""configs/llava.py: what each stage trains, and answers about images."""

import json

import numpy as np
import pytest
from PIL import Image

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.config import recipes
from mtv_jax.encoder import baselines, loading
from mtv_jax.encoder.visual_language import VisualLanguageModel
from mtv_jax.evals.visual_questions import VisualQuestions
from mtv_jax.train.train import train
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import flatten_with_names

COLOURS = dict(red=(220, 30, 30), green=(30, 200, 40), blue=(30, 40, 220))
QUESTION = "What colour is it?"
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


def run(folder, name, options):
  data = f"data={folder}/data.json,template=lines,length=32,batch=16"
  config = recipes.read_config(f"llava:tiny,{data},{options}")
  config.mesh = dict(data=-1)
  train(config, folder / name)
  return dict(flatten_with_names(load_tree(folder / name)))


def assert_changed(old, new, *changed):
  """Names in `changed`, and only these, have new values."""
  for name in old.keys() & new.keys():
    is_equal = np.array_equal(old[name], new[name])
    assert is_equal != name.startswith(changed), name


@pytest.mark.slow
def test_stages(folder, tmp_path):
  """From random parameters; then a new connector; then adapters."""
  whole = run(folder, "whole", "stage=2,steps=80,lr=5e-3")
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
  assert len({*model.answer([QUESTION] * 2)}) == 1
  with pytest.raises(InputError, match="2 questions about 3 images"):
    model.answer([QUESTION] * 2, features, images=[0, 3])
  assert model.protocol()["template"] == "lines"
  evaluator = VisualQuestions(data=str(folder / "data.json"), max_tokens=8)
  metrics = evaluator.run(loading.load(folder / "whole")).metrics
  # Without the image, one answer to the one text; shuffled, all are wrong.
  assert metrics == {
    "accuracy": 1,
    "accuracy_blank": pytest.approx(1 / 3, abs=0.34),
    "accuracy_shuffled": 0,
  }

  connected = run(
    folder, "connected", f"stage=1,steps=2,language_model={folder}/whole"
  )
  assert_changed(whole, connected, "heads/language_model/connector/")

  adapted = run(
    folder, "adapted", f"stage=2,lora=2,steps=2,encoder={folder}/connected"
  )
  assert_changed(connected, adapted, "heads/language_model/connector/")
  added = adapted.keys() - connected.keys()
  assert added and all(name.startswith(DECODER) for name in added)
  assert all(adapted[name].any() for name in added)
  merged = VisualLanguageModel.load(folder / "adapted").encoder.params["heads"]
  assert not any("lora" in name for name, _ in flatten_with_names(merged))


def test_errors(folder):
  for options, message in (
    ("stage=3", "expected 0, 1 or 2"),
    ("stage=1", "encoder=CHECKPOINT"),
    (f"encoder=random:mu/8@32,data=x,language_model={folder}", "config.json"),
  ):
    with pytest.raises((ConfigError, InputError), match=message):
      recipes.read_config(f"llava:{options}")
  with pytest.raises(InputError, match="is no run with the op"):
    VisualLanguageModel.load(folder)
