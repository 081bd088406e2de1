"""Prompts and captions in several languages, as CLIP_benchmark has them."""

import pytest
from dataset_samples import write_json

from mtv_jax.evals.classification.zero_shot import ZeroShot
from mtv_jax.evals.core.prompts import read_language_prompts
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.retrieval import Retrieval
from mtv_jax.utils.errors import InputError, MissingFileError

TEXTS = {"red": "rosso", "green": "verde", "blue": "blu"}


@pytest.fixture
def prompts(tmp_path):
  folder = tmp_path / "prompts"
  classes = {"imagenet1k": ["a", "b"], "rgb": ["red", "green", "blue"]}
  write_json(folder / "it_classnames.json", classes)
  templates = {"imagenet1k": ["una foto di {c}.", "{c}"], "b": ["{c}!"]}
  file = folder / "it_zeroshot_classification_templates.json"
  write_json(file, templates)
  return folder


def test_prompts(prompts):
  given = read_language_prompts(prompts, "it")
  assert given.classes == ("a", "b")
  # A data set without templates has ImageNet's.
  given = read_language_prompts(prompts, "it", prompt_set="rgb")
  assert given.templates == ("una foto di {}.", "{}")
  assert given.name == "it_classnames.json, rgb"
  with pytest.raises(InputError, match="it_classnames.json.*rgb"):
    read_language_prompts(prompts, "it", prompt_set="rgg")
  with pytest.raises(MissingFileError, match="fr_classnames.json"):
    read_language_prompts(prompts, "fr")
  with pytest.raises(InputError, match="needs prompts="):
    ZeroShot(language="it").prepare()


def test_zero_shot(colours, prompts, tmp_path, write_classes):
  write_classes(tmp_path / "set", 2)
  options = dict(data=str(tmp_path / "set"), prompts=str(prompts))
  result = ZeroShot(language="it", prompt_set="rgb", **options).run(colours)
  assert result.metrics["top1"] == 1


def test_captions(tmp_path, write_image):
  root = tmp_path / "set"
  # Paths of another machine.
  paths = [f"/data/root/xtd10/images/{c}.png" for c in TEXTS]
  content = {"image_paths": paths, "annotations": [*TEXTS.values()]}
  write_json(root / "xtd10-it.json", content | {"indices": [0, 1, 2]})
  for colour in TEXTS:
    write_image(root / "xtd10" / "images" / f"{colour}.png", colour)
  data = Retrieval(data=str(root), language="it")._set
  assert data.captions == tuple(TEXTS.values())
  assert list(data.owner) == [0, 1, 2]
  assert data.images[2][0, 0].tolist() == [0, 0, 255]
  for given in (str(root), "scenes", {"type": "scenes"}):
    with pytest.raises(MissingFileError, match="captions in 'de'"):
      Retrieval(data=given, language="de").prepare()
  content["annotations"].pop()
  file = write_json(root / "xtd10-it.json", content)
  with pytest.raises(InputError, match="2 captions for 3 images"):
    registry.open_captions(file)
