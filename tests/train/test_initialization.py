"""The guard of a loaded text tower's tokenizer."""

import types

import pytest
import trainings

from mtv_jax.config import recipes
from mtv_jax.data import tokenizers
from mtv_jax.encoder import loading
from mtv_jax.train.initialization import check_source_tokenizer
from mtv_jax.train.run import resolve
from mtv_jax.utils.errors import ConfigError


@pytest.mark.parametrize(
  ("options", "is_rejected"),
  [
    ({}, True),
    (dict(include=("token_embedding$",)), True),
    (dict(include=("^image/", "^text/")), True),
    (dict(include=("^image/",)), False),
    (dict(include=("token_embedding/embedding",)), False),
    (dict(new_tokenizer=True), False),
  ],
)
def test_other_tokens_than_the_source(options, is_rejected, monkeypatch):
  """Rejected if the token embedding is loaded, by its parameter's name."""
  files = types.SimpleNamespace(
    build=lambda: tokenizers.build_tokenizer("bytes", clean="none")
  )
  described = types.SimpleNamespace(tokenizer=files)
  monkeypatch.setattr(loading, "read_model_info", lambda path: described)
  config = recipes.read_config(str(trainings.CONFIG))
  config.init = dict(path="source", **options)
  ours = tokenizers.build_tokenizer("bytes", clean="lower")
  if is_rejected:
    with pytest.raises(ConfigError, match="which encodes .* differently"):
      check_source_tokenizer(resolve(config), ours)
  else:
    check_source_tokenizer(resolve(config), ours)
