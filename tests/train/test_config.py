"""Resolving a config: defaults, errors, `config.json`."""

import copy
import json
import pathlib
import subprocess
import sys
import types

import pytest
import trainings
from ml_collections import ConfigDict

from mtv_jax.cli import arguments
from mtv_jax.cli import train as cli_train
from mtv_jax.data import tokenizers
from mtv_jax.encoder import loading
from mtv_jax.perf import topologies
from mtv_jax.train import config as config_lib
from mtv_jax.train.config import resolve
from mtv_jax.train.tokenizer import check_source_tokenizer
from mtv_jax.train.train import warn_of_changed_data
from mtv_jax.utils import path_patterns
from mtv_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
  "batch_size": 8,
  "total_steps": 10,
  "data": {"train": [{"type": "scenes"}], "ops": "decode|canvas(32)"},
  "views": {"image": {"ops": "resize(32)"}},
  "model": {"text": {}},
  "objectives": {"contrastive": {}},
  "optim": {"lr": 1e-3},
}


def small(**changes):
  """SMALL with changes such as optim__lr=1."""
  config = copy.deepcopy(SMALL)
  for path, value in changes.items():
    *parents, last = path.split("__")
    section = config
    for parent in parents:
      section = section.setdefault(parent, {})
    section[last] = value
  return config


def test_a_resolved_config_has_all_defaults_and_opens_again():
  config = resolve(ConfigDict(small(evals__zero_shot={"topk": 5})))
  written = json.loads(json.dumps(config.to_dict()))
  assert written["optim"]["name"] == "adamw"
  assert written["schedule"]["warmup_steps"] == 0
  axes = {"data": -1, "fsdp": 1, "tensor": 1}
  assert written["mesh"] == {**axes, "dcn": axes}
  assert written["objectives"] == {
    "contrastive": {"type": "contrastive", "weight": 1.0}
  }
  assert written["evals"] == {"zero_shot": {"type": "zero_shot", "topk": 5}}
  assert written["ema"] is None and written["model"]["text"]["variant"] == "B"
  assert resolve(config) is config
  assert resolve(written) == config


def test_a_run_records_the_commits_of_the_hub(monkeypatch, tmp_path):
  commits = iter(["a" * 40, "b" * 40, "c" * 40])
  monkeypatch.setattr(path_patterns, "_find_commit", lambda *_: next(commits))
  url = "hf://datasets/lab/pairs{}/x.parquet"
  config = small(data__train=[{"type": "parquet", "path": url.format("")}])
  first = resolve(config, tmp_path)
  assert first.data.train[0]["path"] == url.format("@" + "a" * 40)
  (tmp_path / "config.json").write_text(json.dumps(first.to_dict()))
  # Without a checkpoint, the run starts again.
  assert resolve(config, tmp_path).data.commits != first.data.commits
  monkeypatch.setattr(config_lib, "saved_steps", lambda workdir: [5])
  assert resolve(config, tmp_path).data == first.data
  assert resolve(first.to_dict()) == first
  # Another revision is not the recorded one.
  config["data"]["train"][0]["path"] = url.format("@v2")
  assert resolve(config, tmp_path).data.train[0]["path"].count("c") == 40


def test_given_values_and_units_stay():
  config = small(
    schedule={"warmup_percent": 5},
    optim__rules=[("x", {"lr": 0})],
    model__text={"vocab_size": 258},
    model__registers=4,
    evals={"a": None, "b": {"type": "zero_shot", "every_epochs": 1}},
  )
  del config["total_steps"]
  config["total_epochs"] = 3
  before = copy.deepcopy(config)
  got = resolve(config).to_dict()
  assert got["schedule"]["warmup_percent"] == 5
  assert "warmup_steps" not in got["schedule"]
  assert "total_steps" not in got and got["total_epochs"] == 3
  assert got["optim"]["rules"] == [["x", {"lr": 0}]]
  assert got["model"]["text"]["vocab_size"] == 258
  assert got["model"]["registers"] == 4
  assert list(got["evals"]) == ["b"]
  assert config == before


def test_what_objectives_decide_is_filled_in_once(caplog):
  masked = {"ops": "crop(32, 0.5, 1.0)|blocks(0.2, 0.5)"}
  config = small(views__global=masked, objectives={"ibot": {}})
  config["objectives"]["ibot"]["view"] = "global"
  run = resolve(config)
  assert run.model.text is None and "text is left out" in caplog.text
  assert run.model.options["mask_token"] and run.parts.model.image.mask_token
  assert resolve(run.to_dict()) == run
  config["objectives"]["captioning"] = {}
  run = resolve(config)
  assert run.optim.rules == (["^text/", {"lr": 0.0}],)
  assert run.parts.model.text is not None
  assert resolve(run.to_dict()) == run


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bach_size": 1}, "config.bach_size.*Did you mean 'batch_size'"),
    ({"checkpoint__every_epoch": 1}, "Did you mean 'every_epochs'"),
    ({"data__shufle": "none"}, "config.data.shufle"),
    ({"batch_size": None}, "config.batch_size is missing"),
    ({"log__profile_steps": (5, 3)}, r"profile_steps is \(5, 3\), expected"),
    ({"batch_size": 0}, "config.batch_size is 0, expected an integer >= 1"),
    ({"batch_size": 10**23}, "config.batch_size is 10*, expected an integer"),
    ({"batch_size": 2**63 - 1}, "config.batch_size is 9223372036854775807"),
    ({"views__image__count": 10**6}, "config.views.image.count is 1000000"),
    ({"objectives__contrastive__weight": float("nan")}, "weight is nan, expec"),
    ({"objectives__contrastive__weight": float("inf")}, "weight is inf, expec"),
    ({"evals": {"a": {"type": "retrieval", "bound": 5}}}, "a.bound is 5, exp"),
    ({"seed": -1}, "config.seed is -1, expected an.*<= 4294967295"),
    (
      {"objectives__contrastive": {"weight": -1.0}},
      "config.objectives.contrastive.weight is -1.0, expected a number >= 0",
    ),
    ({"objectives": {"contrastiv": {}}}, "contrastiv.type is.*'contrastive'"),
    ({"optim__lr": -1.0}, "config.optim.lr is -1.0, expected a number >= 0"),
    ({"optim__lr": float("nan")}, "config.optim.lr is nan, expected a num"),
    ({"optim__lr": None}, "config.optim.lr is missing"),
    ({"optim": 3}, "config.optim is 3, expected a section"),
    ({"ema": {"decay": 1.5}}, "config.ema.decay is 1.5, expected a num"),
    ({"data__max_corrupt": 5.0}, "config.data.max_corrupt is 5.0, expected a"),
    ({"data__workers": -1}, "config.data.workers is -1, expected an integer"),
    ({"checkpoint__keep": 0}, "config.checkpoint.keep is 0"),
    ({"log": {"every_steps": 0}}, "config.log.every_steps is 0, expected a"),
    ({"views__image": {}}, "config.views.image.ops is missing"),
    ({"views__image": "flip"}, "config.views.image is 'flip'"),
    ({"views": [1]}, "config.views is"),
    ({"model__image_mean": 127.0}, "config.model.image_mean is 127.0.*by 255"),
    ({"model__dtype": "float16"}, "config.model.dtype is 'float16'"),
    ({"data__train": []}, "config.data.train is empty"),
    ({"data__train": ["a"]}, r"config.data.train\[0\] is 'a'"),
    ({"data__train": [{}]}, r"config.data.train\[0\]"),
    ({"evals": {"a/b": {"type": "retrieval"}}}, "evals has an entry 'a/b'"),
  ],
)
def test_errors_name_the_key(changes, message):
  with pytest.raises(ConfigError, match=message):
    resolve(small(**changes))


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
  config = trainings.smallest(init=dict(path="source", **options))
  ours = tokenizers.build_tokenizer("bytes", clean="lower")
  if is_rejected:
    with pytest.raises(ConfigError, match="which encodes .* differently"):
      check_source_tokenizer(resolve(config), ours)
  else:
    check_source_tokenizer(resolve(config), ours)


def test_changed_data_is_logged_at_a_resume(caplog):
  a, b = [{"digest": "a"}], [{"digest": "b"}]
  warn_of_changed_data(a, a, step=7)
  warn_of_changed_data(None, a, step=7)
  assert not caplog.records
  warn_of_changed_data(a, b, step=7)
  (record,) = caplog.records
  assert record.getMessage() == (
    "The training data has changed since step 7, so the next rows differ"
    " from an uninterrupted run's: data[0].digest: 'a' -> 'b'."
  )


def test_a_run_that_exists_keeps_its_settings(monkeypatch, tmp_path):
  """A new one takes the recipe's settings for its TPUs, before overrides."""
  monkeypatch.setattr(cli_train.jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(topologies, "name_devices", lambda _: "v5p:4x4x8")
  args = cli_train.Flags(
    config="mtv_b16_224", workdir=str(tmp_path), set=["mesh.fsdp=4"]
  )
  recipe = arguments.read_config(args)
  plain = config_lib.check_config(recipe)
  chosen = cli_train.choose_settings(recipe, plain, args)
  assert (chosen.model.remat[:11], chosen.mesh.fsdp) == ("full|image=", 4)
  for config in (plain, chosen):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert cli_train.choose_settings(recipe, plain, args) == config


@pytest.mark.slow
def test_training_imports_no_instruments(tmp_path):
  """The search for a remat, and the page at the end, are imported when used.

  A dry run before leaves no folder.
  """
  code = f"""
import pathlib, sys
from mtv_jax.cli import train
train.write_report = lambda folder: None
from mtv_jax.cli.main import run_command
command = [
  "--config={ROOT}/tests/configs/smallest.py:steps=3,save=3",
  "--workdir={tmp_path}/run", "--config.evals=None",
]
assert run_command("train", [*command, "--dry_run"]) == 0
assert not pathlib.Path("{tmp_path}/run").exists()
assert run_command("train", command) == 0
instruments = ("mtv_jax.perf", "mtv_jax.studies", "mtv_jax.report")
sys.exit(str([m for m in sys.modules if m.startswith(instruments)] or 0))
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.stderr.strip().splitlines()[-1] == "0", done.stderr
  assert f"Dry run of {tmp_path}/run: nothing is compiled" in done.stdout
