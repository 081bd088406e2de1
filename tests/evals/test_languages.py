"""Prompts and captions in several languages, as CLIP_benchmark has them."""

import pytest
from dataset_samples import write_json

from mtv_jax.evals.classification.zero_shot import ZeroShot
from mtv_jax.evals.core.prompts import read_prompts
from mtv_jax.evals.datasets import registry
from mtv_jax.utils.errors import InputError

TEXTS = {"red": "rosso", "green": "verde", "blue": "blu"}


@pytest.fixture
def prompts(tmp_path):
  folder = tmp_path / "prompts"
  classes = {"imagenet1k": ["a", "b"], "rgb": ["red", "green", "blue"]}
  templates = {"imagenet1k": ["una foto di {c}.", "{c}"], "b": ["{c}!"]}
  file = folder / "it_zeroshot_classification_templates.json"
  write_json(file, templates)
  return write_json(folder / "it_classnames.json", classes)


def test_prompts(prompts):
  assert read_prompts(prompts).classes == ("a", "b")
  # A data set without templates has ImageNet's.
  given = read_prompts(prompts, prompt_set="rgb")
  assert given.templates == ("una foto di {}.", "{}")
  assert given.name == "it_classnames.json, rgb"
  with pytest.raises(InputError, match="it_classnames.json.*rgb"):
    read_prompts(prompts, prompt_set="rgg")
  (prompts.parent / "it_zeroshot_classification_templates.json").unlink()
  with pytest.raises(InputError, match="templates.json: imagenet1k is missing"):
    read_prompts(prompts)


def test_zero_shot(colours, prompts, tmp_path, write_classes):
  write_classes(tmp_path / "set", 2)
  options = dict(data=str(tmp_path / "set"), prompts=str(prompts))
  result = ZeroShot(prompt_set="rgb", **options).run(colours)
  assert result.metrics["top1"] == 1


def test_captions(tmp_path, write_image):
  root = tmp_path / "set"
  # Paths of another machine.
  paths = [f"/data/xtd10/images/{c}.png" for c in TEXTS]
  content = {"image_paths": paths, "annotations": [*TEXTS.values()]}
  write_json(root / "xtd10-it.json", content | {"indices": [0, 1, 2]})
  for colour in TEXTS:
    write_image(root / "xtd10" / "images" / f"{colour}.png", colour)
  file = root / "xtd10-it.json"
  data = registry.open_captions(file)
  assert data.captions == tuple(TEXTS.values())
  assert list(data.owner) == [0, 1, 2]
  assert data.images[2][0, 0].tolist() == [0, 0, 255]
  content["annotations"].pop()
  write_json(file, content)
  with pytest.raises(InputError, match="2 captions for 3 images"):
    registry.open_captions(file)
