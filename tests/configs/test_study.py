"""The study's recipe: objectives of an argument, held-out scenes, cache."""

import pytest

from mtv_jax.config import schema
from mtv_jax.data import tokenizers
from mtv_jax.evals import run as evals_lib
from mtv_jax.evals.datasets.scenes import PROBE_SCENES
from mtv_jax.utils.errors import ConfigError

SSL = ["distillation", "masked_latent", "masked_pixels"]


def read(arg):
  return schema.check_config(schema.read_config(f"study:{arg}"))


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ("vl", ["contrastive"]),
    ("ssl", ["contrastive", *SSL]),
    ("grounding", ["contrastive", *SSL, "grounding"]),
    ("depth", ["contrastive", *SSL, "grounding", "depth"]),
    ("vl+depth", ["contrastive", "depth"]),
    ("depth+ssl", [*SSL, "depth"]),
    ("without_ssl", ["contrastive", "grounding", "depth"]),
    ("without_vl", [*SSL, "grounding", "depth"]),
  ],
)
def test_objectives_of_an_argument(text, names):
  config = read(f"objectives={text}")
  assert sorted(config.objectives) == sorted(names)
  assert ("zero_shot" in config.evals) == ("contrastive" in names)
  assert ("relative_depth" in config.evals) == ("depth" in names)
  evals_lib.build(config.evals.to_dict())


@pytest.mark.parametrize("text", ["vl+dpeth", "without_vlm", ""])
def test_unknown_objectives(text):
  with pytest.raises(ConfigError, match=r"is none of vl, ssl, grounding"):
    read(f"objectives={text}")


def test_scenes_of_splits_and_training_are_disjoint():
  ranges = [(0, read("tiny=False").data.train[0]["length"])]
  for split in ("validation", "test"):
    for entry in read(f"split={split}").evals.values():
      for data in filter(None, (entry.get("data"), entry.get("train"))):
        first, length = data["first"], data["length"]
        ranges += [(first, length), (first + PROBE_SCENES, length)]
  starts = sorted({first for first, _ in ranges})
  assert len(starts) == 5
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
