"""`mtv-jax config`: resolved configs and their differences."""

import ast
import json
import re

import jax
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.config import recipes
from mtv_jax.train.run import resolve

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
  tree = json.loads(printed(capsys, f"--config={RECIPE}", "--json"))
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
  (tmp_path / "config.json").write_text(json.dumps(recorded))
  change = "--config.optim.lr=0.5"
  text = printed(capsys, RECIPE, f"--against={tmp_path}", change)
  assert text.splitlines()[0] == f"# {RECIPE} | {tmp_path}"
  lines = text.splitlines()[1:]
  assert sorted(filter(None, lines)) == [
    f"evals.old = absent | {section}",
    f"optim.lr = 0.5 | {lr}",
  ]
  rows = json.loads(printed(capsys, RECIPE, str(tmp_path), change, "--json"))
  assert rows == {
    "optim.lr": {"config": 0.5, "against": lr},
    "evals.old": {"against": section},
  }
  assert printed(capsys, RECIPE, RECIPE).endswith("\nNo key differs.\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "got 0 configs, expected one"),
    ([RECIPE] * 3, "got 3 configs"),
    (["siglip_b16"], "no config 'siglip_b16'. .*siglip_b16_224"),
    (["/"], "no config '/'"),
    ([RECIPE, "--config.optimizer.lr=1"], "config.optimizer is an unknown key"),
  ],
)
def test_errors_are_one_sentence(arguments, message):
  with pytest.raises(SystemExit, match=f"config: .*{message}"):
    run_command("config", arguments)
