"""tools/evaluate.py: from a folder to a table and JSON."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mtv_jax.config import ConfigError
from mtv_jax.convert import huggingface
from mtv_jax.data import tokenizers
from mtv_jax.evals import datasets, run
from mtv_jax.evals.base import Result
from mtv_jax.models import model as models
from mtv_jax.preprocess import Preprocess


def tool(repo_root, name):
  spec = importlib.util.spec_from_file_location(
    name, repo_root / "tools" / f"{name}.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  tower = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
  text = {"length": 16, "vocab_size": 258, **tower}
  spec = models.ModelSpec.from_config(
    {"image_size": 16, "patch_size": 8, **tower, "text": text}
  )
  head = {"logit_scale": np.array(1.0, "f4"), "logit_bias": np.array(0.0, "f4")}
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32),
    models.abstract_params(spec),
  )
  path = tmp_path_factory.mktemp("encoder") / "untrained"
  huggingface.write_native(
    path,
    spec,
    {**params, "heads": {"contrastive": head}},
    preprocess=Preprocess(size=16).to_dict(),
    tokenizer=tokenizers.build_tokenizer("bytes", clean="lower"),
  )
  return path


def test_all_on_scenes(repo_root, folder, tmp_path, capsys):
  out = tmp_path / "deep" / "out.json"
  tool(repo_root, "evaluate").main(
    [f"--encoder={folder}", "--evals=all", "--count=12", f"--json={out}"]
  )
  printed = capsys.readouterr().out
  content = json.loads(out.read_text())
  assert set(content["evals"]) == {"retrieval", "zero_shot"}
  zero_shot = content["evals"]["zero_shot"]
  assert zero_shot["protocol"]["images"] == 12
  assert zero_shot["protocol"]["input_size"] == 16
  assert zero_shot["protocol"]["preprocess"]["resize"] == "squash"
  assert 0 < zero_shot["chance"]["top1"] < 1
  for name in ("top1", "text_to_image_r1", "data_hash", "ties", "chance %"):
    assert name in printed


def test_errors_are_messages(repo_root, folder, tmp_path):
  main = tool(repo_root, "evaluate").main
  with pytest.raises(SystemExit, match="evaluate: .*Did you mean 'retrieval'"):
    main([f"--encoder={folder}", "--evals=retreival"])
  with pytest.raises(SystemExit, match="found nothing there"):
    main([f"--encoder={tmp_path / 'none'}", "--count=4"])
  with pytest.raises(SystemExit, match="nothing there.*evaluation 'retrieval'"):
    main([f"--encoder={folder}", "--evals=retrieval", "--data=missing.json"])


def test_data_of_one_evaluation(repo_root, folder, tmp_path, write_image):
  for colour in ("red", "blue"):
    write_image(tmp_path / "set" / colour / "0.png", colour)
  prompts = tmp_path / "prompts.json"
  prompts.write_text('{"classes": ["red", "blue", "white"]}')
  out = tmp_path / "out.json"
  tool(repo_root, "evaluate").main(
    [
      f"--encoder={folder}",
      "--evals=zero_shot,retrieval",
      f"--data=zero_shot={tmp_path / 'set'}",
      f"--prompts={prompts}",
      "--count=4",
      f"--json={out}",
    ]
  )
  evals = json.loads(out.read_text())["evals"]
  assert evals["zero_shot"]["protocol"]["classes"] == 3
  assert evals["retrieval"]["protocol"]["data"] == "scenes"


def test_configs_keep_to_what_an_evaluation_takes():
  got = run.configs(
    ["zero_shot", "retrieval"],
    data=["scenes", "retrieval=a=b.json"],
    options={"prompts": "p.json", "split": None, "count": 3},
  )
  assert got == {
    "zero_shot": {
      "type": "zero_shot",
      "data": "scenes",
      "prompts": "p.json",
      "count": 3,
    },
    "retrieval": {"type": "retrieval", "data": "a=b.json", "count": 3},
  }
  with pytest.raises(ConfigError, match="Did you mean 'retrieval'"):
    run.configs(["retreival"])


def test_a_mistake_in_the_last_costs_no_time(colours):
  evals = {"zero_shot": {"count": 4}, "b": {"type": "retrieval", "cuont": 1}}
  with pytest.raises(ConfigError, match="Did you mean 'count'"):
    run.evaluate(colours, evals)
  missing = {"zero_shot": {"count": 4}, "b": {"type": "retrieval", "data": "x"}}
  with pytest.raises(FileNotFoundError, match="nothing there") as error:
    run.evaluate(colours, missing)
  assert error.value.__notes__ == ["(in evaluation 'b')"]
  assert colours.batches == []


def test_evaluators_are_built_once_and_keep_their_data(colours, monkeypatch):
  config = ConfigDict({"zero_shot": {"every_steps": 5, "count": 4}})
  built = run.build(config)
  first = run.evaluate(colours, built)
  monkeypatch.setattr(datasets, "labelled", None)
  second = run.evaluate(colours, built)
  assert first["zero_shot"].metrics == second["zero_shot"].metrics


def test_table_has_chance_and_protocol():
  results = {
    "a": Result({"x": 0.5}, {"templates": list("abcdefghij")}, {"x": 0.25}),
    "b": Result({"y": 1.0}, {}),
  }
  lines = run.table(results).splitlines()
  assert lines[2].split() == ["a", "x", "50.00", "25.00"]
  assert lines[3].split() == ["b", "y", "100.00"]
  assert "  templates: 10: 'a', 'b', ... 'j'" in lines


@pytest.mark.reference
def test_make_prompts(repo_root, tmp_path, capsys):
  pytest.importorskip("open_clip")
  path = tmp_path / "imagenet.json"
  tool(repo_root, "make_prompts").main([f"--output={path}"])
  assert "1000 classes, 80 templates" in capsys.readouterr().out
  assert len(json.loads(path.read_text())["ids"]) == 1000
