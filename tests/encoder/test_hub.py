"""Models of the hub, against a local stand-in: download, push, cards."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from hub_server import serve

import mtv_jax
from mtv_jax.cli.main import run_command
from mtv_jax.convert import card, huggingface
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import loading
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.experts.build import build_expert
from mtv_jax.models import two_tower
from mtv_jax.utils import hub
from mtv_jax.utils.errors import InputError, MissingFileError

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path):
  hub.download.cache_clear()
  with serve(tmp_path / "cache") as found:
    yield found
  hub.download.cache_clear()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
  """An export of an image tower with random weights."""
  shape = dict(width=32, depth=1, heads=2, mlp_dim=32)
  spec = two_tower.ModelSpec.from_config(
    dict(patch_size=8, image_size=16, pool="map", **shape)
  )
  params = jax.device_get(two_tower.init_params(spec, jax.random.key(0)))
  preprocess = Preprocess(size=16).to_dict()
  folder = tmp_path_factory.mktemp("hub") / "export"
  huggingface.write(folder, ConvertedModel(spec, params, preprocess))
  return folder


def files_of(folder):
  return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def test_a_model_of_the_hub_and_its_revisions(server, export, monkeypatch):
  server.create("lab/model")
  files = files_of(export) | {"pytorch_model.bin": b"not read"}
  files["model.fp16.safetensors"] = b"nor this copy"
  first = server.commit("lab/model", "main", files)
  want = loading.read_model(export)
  got = loading.read_model("lab/model")
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  others = ("pytorch_model", "fp16")
  assert not any(x in line for line in server.requests for x in others)
  # Once for a process; by another name the cache has the files.
  count = len(server.requests)
  assert loading.read_model_info("lab/model").spec == want.spec
  assert len(server.requests) == count
  for name in ("hf:lab/model", f"hf:lab/model@{first}"):
    encoder = mtv_jax.load(name)
    assert encoder.source == encoder.protocol()["encoder"]
    assert encoder.source == f"hf:lab/model@{first}"
  assert mtv_jax.load(export).source == str(export)
  # A later revision of the branch is taken by the next process.
  config = files["mtv_jax.json"].replace(b'"size": 16', b'"size": 8')
  assert config != files["mtv_jax.json"]
  server.commit("lab/model", "main", {"mtv_jax.json": config})
  assert loading.read_model_info("lab/model").preprocess.size == 16
  hub.download.cache_clear()
  assert loading.read_model_info("lab/model").preprocess.size == 8
  assert loading.read_model_info(f"lab/model@{first}").preprocess.size == 16
  # Without a network the cache is read.
  hub.download.cache_clear()
  monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
  assert loading.read_model_info("hf:lab/model").preprocess.size == 8


def test_an_image_tower_does_not_replace_an_open_clip_model(server):
  server.create("lab/model")
  files = {"open_clip_config.json": b'{"model_cfg": {}}'}
  files["model.safetensors"] = b"the image tower"
  files["open_clip_pytorch_model.bin"] = b"all"
  server.commit("lab/model", "main", files)
  assert files_of(loading.open_folder("lab/model")) == files


def test_commands_open_models_of_the_hub(server, export, tmp_path):
  server.create("lab/model")
  server.commit("lab/model", "main", files_of(export))
  want = loading.read_model(export)
  for command, name in (("from_hf", "lab/model"), ("to_hf", "hf:lab/model")):
    run_command("convert", [command, name, str(tmp_path / command)])
    got = loading.read_model(tmp_path / command)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  assert build_expert("features", "lab/model").settings["size"] == 16
  with pytest.raises(MissingFileError, match="lab/none is not a local path"):
    build_expert("features", "lab/none")


def test_what_is_no_model(server, tmp_path, monkeypatch):
  with pytest.raises(MissingFileError, match="none is not a local path.*404"):
    mtv_jax.load("lab/none")
  server.create("lab/model")
  with pytest.raises(MissingFileError, match="lab/model@v9"):
    mtv_jax.load("hf:lab/model@v9")
  for name in ("hf:model", "hf:a/b/c", "hf:../x", "hf:-a/b", "hf:a/b..c"):
    with pytest.raises(InputError, match="expected hf:ORG/NAME"):
      mtv_jax.load(name)
  # A folder of that name is a path.
  monkeypatch.chdir(tmp_path)
  (tmp_path / "lab").mkdir()
  assert not hub.is_name("lab/model") and hub.is_name("hf:lab/model")
  with pytest.raises(MissingFileError, match="lab/model does not exist"):
    mtv_jax.load("lab/model")


def test_push(server, export, tmp_path, capsys, monkeypatch):
  """The card's code runs on the uploaded files."""
  results = tmp_path / "results.json"
  command = [f"--encoder={export}", "--evals=feature_rank", "--count=3"]
  run_command("evaluate", [*command, f"--json={results}"])
  options = ["--license=apache-2.0", "--data=40 photos", "--base_model=lab/b"]
  options.append(f"--results={results}")
  for repo in ("lab/old", "lab/new"):  # The second replaces the card's parts.
    run_command("push", [str(export), repo, *options])
  assert "to lab/new: http" in capsys.readouterr().out
  commit = server.commits[server.revisions["lab/new"]["main"]]
  assert commit.keys() == files_of(export).keys()
  text = commit["README.md"].decode()
  head, body = text.split("---\n", 2)[1:]
  for line in ("license: apache-2.0", "base_model: lab/b"):
    assert head.count(line) == 1
  assert text.count("## Training data\n\n40 photos") == 1
  assert "rankme" in body and "data_hash" in body
  assert "lab/old" not in text
  code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[-1]
  assert 'mtv_jax.load("lab/new")' in code
  monkeypatch.chdir(tmp_path)
  PIL.Image.new("RGB", (20, 16), "red").save("photo.jpg")
  names = {}
  exec(code, names)
  assert names["features"].pooled.shape == (1, 32)


@pytest.mark.reference
def test_transformers_runs_the_code_of_a_card(server, export, tmp_path):
  """In a subprocess, since HF_ENDPOINT is read on import."""
  pytest.importorskip("transformers")
  run_command("push", [str(export), "lab/new", "--license=mit", "--data=x"])
  commit = server.commits[server.revisions["lab/new"]["main"]]
  text = commit["README.md"].decode()
  code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
  assert 'AutoModel.from_pretrained("lab/new")' in code
  PIL.Image.new("RGB", (20, 16), "red").save(tmp_path / "photo.jpg")
  done = subprocess.run(
    [sys.executable, "-c", f"{code}\nprint(tuple(embedding.shape))"],
    cwd=tmp_path,
    env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.strip().endswith("(1, 32)"), done.stderr


def lacks_weights(folder):
  (folder / "model.safetensors").unlink()


def in_latin(folder):
  (folder / "README.md").write_bytes(b"---\n---\ncaf\xe9")


def emptied(folder):
  shutil.rmtree(folder)
  folder.mkdir()


@pytest.mark.parametrize(
  ("change", "repo", "options", "message"),
  [
    (None, "new", (), "expected ORG/NAME"),
    (None, "-a/..b", (), "expected ORG/NAME"),
    (None, "a/b--c", (), "expected ORG/NAME"),
    (emptied, "lab/new", (), "is not an export"),
    (None, "lab/new", ("--license=Apache 2",), "not an identifier of the hub"),
    (lacks_weights, "lab/new", (), "push: .*lacks model.safetensors"),
    (in_latin, "lab/new", (), "push: .*README.md is not UTF-8 text"),
  ],
)
def test_what_can_not_be_pushed(
  export, tmp_path, change, repo, options, message
):
  folder = shutil.copytree(export, tmp_path / "copy")
  if change:
    change(folder)
  before = files_of(folder)
  options = ["--license=mit", "--data=x", *options, "--", str(folder), repo]
  with pytest.raises(SystemExit, match=message):
    run_command("push", options)
  assert files_of(folder) == before


def test_logging_in_is_suggested_if_access_is_denied(
  server, export, monkeypatch
):
  command = [str(export), "lab/new", "--license=mit", "--data=x"]
  with monkeypatch.context() as patch:
    patch.setenv("HF_ENDPOINT", "http://localhost:9")
    with pytest.raises(SystemExit, match=r"can't be uploaded.*\.$") as caught:
      run_command("push", command)
    assert "HF_TOKEN" not in str(caught.value)
  monkeypatch.setenv("HF_TOKEN", "")
  with pytest.raises(SystemExit, match="can't be uploaded.*HF_TOKEN"):
    run_command("push", command)


def test_cards_without_metrics_and_of_other_licences(export, tmp_path, caplog):
  folder = shutil.copytree(export, tmp_path / "export")

  def push(*options):
    caplog.clear()
    command = [str(folder), "lab/new", "--data=x", "--dry_run", *options]
    run_command("push", command)
    return (folder / "README.md").read_text().split("---\n")[1]

  assert "license: other\n" in push("--license=other")
  assert "no metrics: pass them as --results" in caplog.text
  assert "asks for --license_name and --license_link" in caplog.text
  named = ("--license_name=lab-1.0", "--license_link=LICENSE")
  for _ in range(2):
    head = push("--license=other", *named)
  assert head.count("license_name: lab-1.0\n") == 1
  assert head.count('license_link: "LICENSE"\n') == 1
  assert "asks for" not in caplog.text
  assert "license_" not in push("--license=mit")
  with pytest.raises(SystemExit, match="licence 'other', not 'mit'"):
    push("--license=mit", *named)


def test_a_card_keeps_what_its_owner_wrote(export):
  readme = (export / "README.md").read_text()
  own = 'As `AutoModel.from_pretrained("lab/base")` and `load("lab/other")`.'
  readme = readme.replace("## With mtv_jax", f"{own}\n\n## With mtv_jax")
  facts = dict(licence="mit", data="x")
  text = readme
  for repo in ("lab/old", "lab/new"):
    text = card.complete_card(text, repo=repo, **facts)
    assert own in text and f'mtv_jax.load("{repo}")' in text
  assert "lab/old" not in text
  assert text == card.complete_card(readme, repo="lab/new", **facts)


def test_metadata_of_several_lines():
  own = "tags:\n- photos\n- animals\nnote: see ---\n"
  lists = "base_model:\n- lab/a\n- lab/b\nlicense:\n  - mit\n"
  text = f"---\n{lists}{own}---\n# A model\n"
  for _ in range(2):
    facts = dict(licence="mit", data="x", base_model="lab/c")
    text = card.complete_card(text, repo="lab/new", **facts)
  completed = f"---\n{own}license: mit\nbase_model: lab/c\n---\n# A model\n"
  assert text.startswith(completed)
