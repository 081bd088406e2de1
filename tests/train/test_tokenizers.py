"""The tokenizer of a run: from the hub, trained, and its vocabulary's size."""

import json

import numpy as np
import pytest
import tokenizer_parity
import trainings
from hub_server import serve

from mtv_jax.data import tokenizers
from mtv_jax.data.tokenizers import sentencepiece
from mtv_jax.encoder import loading
from mtv_jax.train import config as config_lib
from mtv_jax.train import tokenizer as run_tokenizer
from mtv_jax.train.config import resolve
from mtv_jax.train.run import open_run, save_config
from mtv_jax.utils import hub
from mtv_jax.utils.errors import ConfigError, MissingFileError

TEXTS = ["a small blue ball", "a cat on a mat", "ein Mädchen"]


def config_of(tokenizer, arg="", **text):
  config = trainings.smallest(arg, evals={})
  config.model.text.update(tokenizer=tokenizer, vocab_size=None, **text)
  return config


@pytest.fixture
def server(tmp_path):
  hub.download.cache_clear()
  with serve(tmp_path / "cache") as found:
    found.create("lab/text")
    yield found
  hub.download.cache_clear()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Two SentencePiece models."""
  folder = tmp_path_factory.mktemp("models")
  ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
  for size in (50, 60):
    path = folder / f"{size}"
    tokenizer_parity.train_sentencepiece(path, vocab_size=size, **ids)
  return [(folder / f"{size}").read_bytes() for size in (50, 60)]


def restart(monkeypatch, workdir, config):
  """Resolves a config as if the run had a checkpoint."""
  with monkeypatch.context() as patch:
    patch.setattr(config_lib, "saved_steps", lambda workdir: [1])
    return resolve(config, workdir)


def test_a_tokenizer_of_the_hub_keeps_its_commit(
  server, models, tmp_path, monkeypatch
):
  first = server.commit("lab/text", "main", {"spiece.model": models[0]})
  config = config_of("lab/text")
  found = resolve(config, tmp_path)
  assert found.model.text.tokenizer == f"lab/text@{first}"
  assert found.parts.model.text.vocab_size == 50
  save_config(open_run(found, tmp_path))
  copy = tmp_path / "tokenizer" / "spiece.model"
  assert copy.read_bytes() == models[0]

  second = server.commit("lab/text", "main", {"spiece.model": models[1]})
  hub.download.cache_clear()
  assert resolve(config).model.text.vocab_size == 60
  server.requests.clear()
  resumed = restart(monkeypatch, tmp_path, config)
  assert resumed == found and resolve(found.to_dict()) == found
  assert resumed.data.commits == {"lab/text": first}
  assert not server.requests
  # A new revision is read if the command names it.
  other = restart(monkeypatch, tmp_path, config_of(f"lab/text@{second}"))
  assert other.model.text.tokenizer == f"lab/text@{second}"
  prefixed = resolve(config_of("hf:lab/text@main"))
  assert prefixed.model.text.tokenizer == f"hf:lab/text@{second}"


def test_a_tokenizer_json_of_the_hub_names_its_special_tokens(server, tmp_path):
  tokenizers.export_files(tokenizers.build_tokenizer("bytes"), tmp_path)
  names = ("tokenizer.json", "tokenizer_config.json")
  files = {name: (tmp_path / name).read_bytes() for name in names}
  server.commit("lab/text", "main", {**files, "model.safetensors": b"large"})
  built = open_run(config_of("lab/text"), tmp_path / "run")
  save_config(built)
  folder = tmp_path / "run" / "tokenizer"
  assert {f.name: f.read_bytes() for f in folder.iterdir()} == files
  assert not any("safetensors" in request for request in server.requests)
  want = tokenizers.build_tokenizer("bytes").encode(TEXTS, 16)
  np.testing.assert_array_equal(built.tokenizer.encode(TEXTS, 16), want)


@pytest.mark.parametrize(
  ("name", "message"),
  [("lab/text", "has no spiece.model"), ("lab/other", "Repository Not Found")],
)
def test_a_repository_without_a_tokenizer(server, tmp_path, name, message):
  server.commit("lab/text", "main", {"README.md": b"no tokenizer"})
  with pytest.raises(MissingFileError, match=message):
    open_run(config_of(name), tmp_path)


def test_rows_follow_the_tokenizer_unless_given_or_recorded(
  tmp_path, monkeypatch, caplog
):
  assert resolve(config_of("bytes")).model.text.vocab_size == 258
  wide = config_of("bytes")
  wide.model.text.vocab_size = 300
  assert resolve(wide).parts.model.text.vocab_size == 300
  assert not caplog.messages
  # A run that was started with more rows keeps them.
  (tmp_path / "config.json").write_text(json.dumps(resolve(wide).to_dict()))
  config = config_of("bytes")
  assert resolve(config, tmp_path).model.text.vocab_size == 258
  resumed = restart(monkeypatch, tmp_path, config)
  assert resumed.model.text.vocab_size == 300
  # So does a second stage that starts from it.
  second = config_of("bytes")
  second.init = dict(path=str(tmp_path))
  assert resolve(second).model.text.vocab_size == 300
  second.init.new_tokenizer = True
  assert resolve(second).model.text.vocab_size == 258
  absent = str(tmp_path / "absent.model")
  assert resolve(config_of(absent)).model.text.vocab_size == 32_000
  assert (
    "vocab_size=32000: the tokenizer can't be read: tokenizer=" in caplog.text
  )
  # A run needs it: an error, and no warning before.
  caplog.clear()
  with pytest.raises(MissingFileError, match="there is no such file"):
    resolve(config_of(absent), tmp_path)
  assert not caplog.messages


@pytest.mark.parametrize(
  ("size", "texts", "message"),
  [
    (1000, TEXTS, r"yield only \d+ pieces. Set tokenizer=train:\d+ or fewer"),
    (8, TEXTS, r"train:8: the characters .* need 19 pieces; set .*=train:19"),
    (8, [" ", ""], "train:8: data.train has no captions to train on"),
  ],
)
def test_captions_that_do_not_give_the_pieces(size, texts, message):
  with pytest.raises(ConfigError, match=message):
    sentencepiece.train_sentencepiece(texts, size, "lower")


@pytest.mark.parametrize("spec", ["train:many", "train:0", "train:"])
def test_a_size_that_is_no_number(spec):
  with pytest.raises(ConfigError, match="expected train:N"):
    resolve(config_of(spec))


def test_a_run_resumes_with_the_tokenizer_it_trained(tmp_path, monkeypatch):
  config, folder = config_of("train:64"), tmp_path / "tokenizer"
  folder.mkdir()
  copy = folder / "tokenizer.model"
  copy.write_bytes(b"of a start that saved no checkpoint")
  first = open_run(config, tmp_path)
  save_config(first)
  monkeypatch.setattr(sentencepiece, "train_sentencepiece", None)
  monkeypatch.setattr(run_tokenizer, "saved_steps", lambda workdir: [1])
  second = open_run(config, tmp_path)
  assert second.config == first.config
  assert second.tokenizer.path == str(copy)
  want = first.tokenizer.encode(TEXTS, 16)
  np.testing.assert_array_equal(second.tokenizer.encode(TEXTS, 16), want)
  assert len(np.unique(want)) > 10
  # Exports and encoders read it too.
  _, model = loading.read_run_config(tmp_path)
  assert model.tokenizer.path == copy and model.spec.text.vocab_size == 64


@pytest.mark.slow
def test_one_process_trains_the_tokenizer_of_all(tmp_path):
  code = f"""
import os, pathlib
folder = pathlib.Path({str(tmp_path)!r}) / str(process)
os.environ["MTV_JAX_CACHE_DIR"] = str(folder)
from mtv_jax.data.tokenizers import sentencepiece
from mtv_jax.train.run import open_run
from trainings import smallest
if process == 1:
  sentencepiece.train_sentencepiece = None
config = smallest(evals={{}})
config.model.text.update(tokenizer="train:64", vocab_size=None)
open_run(config, folder / "run")
"""
  trainings.run_pair(code, devices=1)
  first, second = (
    [f.read_bytes() for f in (tmp_path / str(i)).rglob("tokenizer.model")]
    for i in range(2)
  )
  assert len(first) == 1 and first == second
