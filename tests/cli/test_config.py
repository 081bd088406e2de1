"""`mtv-jax config`: resolved configs and their differences."""

import ast
import json
import re

import jax
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.config import recipes
from mtv_jax.train.config import resolve

RECIPE = "siglip_b16_224:tiny"


def printed(capsys, *arguments):
  assert run_command("config", arguments) == 0
  return capsys.readouterr().out


def test_a_recipe_prints_every_resolved_key(capsys):
  text = printed(capsys, RECIPE, "--config.data.train[0].limit=7")
  assert text.startswith(f"# {RECIPE}\n")
  config = recipes.read_config(RECIPE)
  config.data.train[0]["limit"] = 7
  expected = resolve(config).to_dict()
  tree = json.loads(printed(capsys, RECIPE, "--json"))
  assert tree["data"]["train"][0].pop("limit", None) is None
  tree["data"]["train"][0]["limit"] = 7
  assert tree == json.loads(json.dumps(expected))
  for line in filter(None, text.splitlines()[1:]):
    key, _, value = line.partition(" = ")
    parts = [int(p) if p.isdigit() else p for p in re.findall(r"\w+", key)]
    *parents, name = parts
    node = tree
    for part in parents:
      node = node[part]
    assert node.pop(name) == ast.literal_eval(value), key
  assert not jax.tree.leaves(tree)  # Every key is printed.


def test_only_differences_are_printed(capsys, tmp_path):
  """Between a recipe and a run, whose config.json lacks a newer key."""
  recorded = resolve(recipes.read_config(RECIPE)).to_dict()
  del recorded["data"]["storage_seconds"]
  lr, section = recorded["optim"]["lr"], {"type": "retrieval"}
  recorded["evals"]["old"] = section
  file = tmp_path / "config.json"
  file.write_text(json.dumps(recorded))
  options = [RECIPE, f"--against={tmp_path}", "--config.optim.lr=0.5"]
  first, *lines = printed(capsys, *options).splitlines()
  assert first == f"# {RECIPE} -> {tmp_path}"
  assert sorted(lines) == [
    f"evals.old: absent -> {section}",
    f"optim.lr: 0.5 -> {lr}",
  ]
  rows = json.loads(printed(capsys, *options, "--json"))
  assert rows == {"optim.lr": [0.5, lr], "evals.old": ["absent", section]}
  same = printed(capsys, str(file), f"--against={tmp_path}")
  assert same.endswith("\nNo key differs.\n")
  file.write_text("{")
  with pytest.raises(SystemExit, match="config.json is damaged"):
    run_command("config", [str(tmp_path)])


def test_what_only_a_start_reads_is_not_filled_in(capsys):
  text = printed(capsys, "siglip_b16_224:tokenizer=/c4.model")
  assert "model.text.vocab_size = None\n" in text
  change = "--config.teachers.a={'path': '/runs/a'}"
  run_command("config", ["dinov2_l16:tiny", change])
  assert "has teachers in folders" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["siglip_b16"], "no config 'siglip_b16'. .*siglip_b16_224"),
    (["/"], "no config '/'"),
    ([RECIPE, "--config.optimizer.lr=1"], "config.optimizer is an unknown key"),
    ([RECIPE, "--config.optim.b3=1"], "config.optim.*b3"),
    ([RECIPE, "--config.evals.retrieval.b3=1"], "config.evals.*b3"),
  ],
)
def test_errors_are_one_sentence(arguments, message):
  with pytest.raises(SystemExit, match=f"config: .*{message}"):
    run_command("config", arguments)
