"""Objective, head, evaluation, source and optimizer in a user's files.

The files are those of docs/training.md and docs/data.md.
"""

import importlib
import json
import os
import re
import shutil
import sys

import jax
import numpy as np
import optax
import optim_samples
import pytest
import trainings

import mtv_jax
from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.cli.main import run_command
from mtv_jax.convert import native
from mtv_jax.encoder import loading
from mtv_jax.evals.core.base import build_evaluator
from mtv_jax.models.heads import UnloadedHead, described_heads, heads_of_config
from mtv_jax.objectives import build_objective
from mtv_jax.train.config import resolve
from mtv_jax.train.optim.transforms import UpdateRule
from mtv_jax.train.runtime.sessions import code_digest
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

FLAT = dict(type="flat:FlatColours", length=48)
ERROR = dict(type="colour:ColourError", count=8, data=FLAT)
SCHEDULE_FREE = dict(name="schedule_free:ScheduleFreeAdamW", b1=0.8)
RECIPE = f"""
from mtv_jax.config import recipes


def get_config(arg=None):
  config = recipes.read_config("{trainings.CONFIG}:steps=6,save=3")
  config.data.train = [{FLAT}]
  config.objectives.colour = dict(type="colour:Colour", hidden=8, noise=0.1)
  config.optim = dict(lr=1e-2, weight_decay=0.1, **{SCHEDULE_FREE})
  config.schedule = dict(name="constant", warmup_steps=2)
  config.evals = dict(colour={ERROR})
  del config.ema
  return config
"""


@pytest.fixture(scope="module")
def plugins(repo_root, tmp_path_factory):
  """The folder of the plug-ins, which is on the path of new processes too."""
  folder = tmp_path_factory.mktemp("plugins")
  for page in ("training", "data"):
    text = (repo_root / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL)
    for name, code in blocks:
      (folder / name).write_text(code)
  (folder / "recipe.py").write_text(RECIPE)
  python_path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", os.pathsep.join(python_path))
    yield folder


@pytest.fixture
def unload(plugins):
  """Forgets the plug-ins' modules, also at the end."""

  def unload():
    for file in plugins.glob("*.py"):
      sys.modules.pop(file.stem, None)

  unload()
  yield unload
  unload()


@pytest.fixture(scope="module")
def run(plugins, tmp_path_factory):
  """A run of the training command with every plug-in."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  trainings.train(folder, config=plugins / "recipe.py")
  return folder


def leaves(run, *parts):
  trees = {part: load_tree(run, step=6, part=part) for part in parts}
  return dict(flatten_with_names(trees))


@pytest.mark.slow
def test_the_averaged_weights_are_evaluated(run, unload):
  config = json.loads((run / "config.json").read_text())
  assert config["weights"] == mtv_jax.load(run).weights == "ema"
  stored = leaves(run, "params", "ema", "opt_state")
  iterates = {n.partition("/z/")[2]: z for n, z in stored.items() if "/z/" in n}
  moved = 0
  for name, z in iterates.items():
    y, x = stored[f"params/{name}"], stored[f"ema/{name}"]
    np.testing.assert_allclose(x, (y - 0.2 * z) / 0.8, rtol=1e-5, atol=1e-6)
    moved += not np.allclose(x, y, atol=1e-4)
  assert moved > 10
  (file,) = (run / "evals").glob("*.json")
  results = json.loads(file.read_text())
  assert results["weights"] == "ema"
  assert results["evals"]["colour"]["type"] == ERROR["type"]
  encoder = mtv_jax.load(run)
  with pytest.raises(InputError, match="plug-ins .'colour:Colour'"):
    encoder.predict("colour", [np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.slow
def test_a_run_resumes_bit_equal(run, plugins, tmp_path):
  again = shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(again / "checkpoints" / "6")
  trainings.train(again, config=plugins / "recipe.py")
  parts = "params", "ema", "opt_state"
  first, second = leaves(run, *parts), leaves(again, *parts)
  assert first.keys() == second.keys()
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.slow
def test_heads_are_loaded_only_on_request(run, unload, tmp_path, capsys):
  """Runs and exports name modules, which the user imports."""
  images = [np.full((16, 16, 3), 40 * i, np.uint8) for i in range(4)]
  unnamed = native.write(tmp_path / "unnamed", loading.read_model(run))
  assert not native.read_info(unnamed).prediction_heads
  assert "colour" not in sys.modules
  importlib.import_module("colour")
  encoder = mtv_jax.load(run)
  want = encoder.predict("colour", images)["colour"]
  patches = encoder.image(images).patches.mean(axis=(1, 2))
  first, last = encoder.params["heads"]["colour"].values()
  hidden = jax.nn.gelu(patches @ first["kernel"] + first["bias"])
  expected = hidden @ last["kernel"] + last["bias"]
  np.testing.assert_allclose(want, expected, atol=1e-5)
  (file,) = (run / "evals").glob("*.json")
  stored = json.loads(file.read_text())["evals"]["colour"]
  result = build_evaluator("colour", ERROR).run(encoder)
  assert result.metrics == pytest.approx(stored["metrics"], rel=1e-4)

  unload()
  out = tmp_path / "out"
  run_command("convert", ["to_hf", str(run), str(out), "--plugin", "colour"])
  described = json.loads((out / native.INFO).read_text())["predictors"]
  assert described == {"colour:ColourHead": {"hidden": 8}}
  unload()
  encoder = mtv_jax.load(out)
  assert not encoder.can_predict("colour")
  with pytest.raises(InputError, match="plug-ins .'colour:ColourHead'"):
    encoder.predict("colour", images)
  again = native.write(tmp_path / "again", loading.read_model(out))
  info = json.loads((again / native.INFO).read_text())
  assert info["predictors"] == described
  assert "colour" not in sys.modules  # Nothing of a description has run.

  importlib.import_module("colour")
  got = mtv_jax.load(again).predict("colour", images)["colour"]
  np.testing.assert_allclose(got, want, atol=1e-6)
  unload()
  run_command(
    "evaluate",
    [f"--encoder={again}", "--evals=colour:ColourError", "--count=4"],
  )
  assert "colour:ColourError" in capsys.readouterr().out


def test_a_command_imports_a_plugin(unload):
  with pytest.raises(SystemExit, match="--plugin=coulour.*PYTHONPATH"):
    run_command("config", [str(trainings.CONFIG), "--plugin=coulour"])
  run_command("config", [str(trainings.CONFIG), "--plugin=colour"])
  assert "colour" in sys.modules


def test_a_stored_config_imports_nothing_unasked(plugins, unload, tmp_path):
  run = resolve(read_recipe(plugins))
  (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
  unload()
  with pytest.raises(SystemExit, match="add --plugin=schedule_free"):
    run_command("config", [str(tmp_path)])
  assert "colour" not in sys.modules
  names = [f"--plugin={name}" for name in ("colour", "flat", "schedule_free")]
  run_command("config", [str(tmp_path), *names])


def test_the_digest_of_the_code_covers_plugins(tmp_path, monkeypatch):
  """Hosts agree on it, and a compiled step is not loaded for other code."""
  config, used = {"type": "digested.a:A"}, tmp_path / "digested_sizes.py"
  file = tmp_path / "digested" / "a.py"
  file.parent.mkdir()
  (file.parent / "__init__.py").touch()
  file.write_text("import jax\nfrom digested_sizes import Size as A")
  used.write_text("class Size:\n  width = 1")
  monkeypatch.syspath_prepend(tmp_path)
  digests = [code_digest(), code_digest(config)]
  assert digests[0] == digests[1]
  importlib.import_module("digested.a")
  digests += [code_digest(config), code_digest(config)]
  assert digests[2] == digests[3] != digests[1]
  used.write_text("class Size:\n  width = 2")
  digests.append(code_digest(config))
  file.write_text("import jax")
  digests.append(code_digest(config))
  assert len({*digests}) == 4
  for name in ("digested.a", "digested", "digested_sizes"):
    sys.modules.pop(name)


def test_schedule_free_equals_optax(unload):
  """With weight decay and a warm-up; a frozen tower keeps its values."""
  rules = [("^text/", dict(lr=0.0)), (".", dict(weight_decay=1.0))]
  config = SCHEDULE_FREE | dict(weight_decay=0.1, b2=0.95, rules=rules)
  optimizer = optim_samples.build(config, dict(name="constant", warmup_steps=3))
  oracle = optax.contrib.schedule_free_adamw(
    optimizer.schedule, b1=0.8, b2=0.95, weight_decay=0.1
  )
  (got, state), (want, other) = map(optim_samples.run, (optimizer.tx, oracle))
  x = optimizer.eval_params(state, unflatten_names(got[-1]))
  want_x = optax.contrib.schedule_free_eval_params(
    other, unflatten_names(want[-1])
  )
  x, want_x, start = (
    dict(flatten_with_names(t)) for t in (x, want_x, optim_samples.PARAMS)
  )
  close = dict(rtol=1e-5, atol=1e-6)
  for name, value in start.items():
    if name.startswith("text/"):
      np.testing.assert_array_equal(got[-1][name], value)
      np.testing.assert_array_equal(x[name], value)
      continue
    for ours, theirs in zip(got, want, strict=True):
      np.testing.assert_allclose(ours[name], theirs[name], **close)
    np.testing.assert_allclose(x[name], want_x[name], **close)
    assert not np.allclose(x[name], got[-1][name], atol=1e-4)


def test_inactive_modules_keep_the_iterates_of_a_wrapper(unload):
  """Their weights would decay within the wrapped transformation."""
  rules = [(".", dict(weight_decay=1.0))]
  options = SCHEDULE_FREE | dict(weight_decay=0.5, rules=rules)
  params, tx = optim_samples.PARAMS, optim_samples.build(options).tx
  _, state = tx.update(
    optim_samples.GRADS[0], tx.init(params), params, inactive=("text",)
  )
  old, new = params["text"]["token_embedding"], state.z["text"]
  np.testing.assert_array_equal(new["token_embedding"], old)
  old, new = params["image"], state.z["image"]
  moved = new["position_embedding"] - old["position_embedding"]
  assert np.abs(moved).max() > 1e-3


class Plain(UpdateRule):
  """Its wrapper drops extra arguments."""

  def scale(self, attention_heads):
    return optax.identity()

  def wrap(self, tx, schedule):
    return optax.GradientTransformation(tx.init, tx.update)


def test_a_wrapper_passes_extra_arguments_on():
  """Without them, it would update inactive modules."""
  with pytest.raises(ConfigError, match="wrap.. returned .*extra arguments"):
    optim_samples.build(dict(name=f"{__name__}:Plain"))


def read_recipe(plugins, **changes):
  config = trainings.recipes.read_config(str(plugins / "recipe.py"))
  config.update(changes)
  return config


def test_an_optimizer_that_averages_excludes_an_ema(plugins, unload):
  with pytest.raises(ConfigError, match=r"leave config\.ema out"):
    resolve(read_recipe(plugins, ema=dict(decay=0.9)))
  run = resolve(read_recipe(plugins, weights="student"))
  assert run.weights == "ema" and resolve(run.to_dict()) == run


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (dict(type="coulour:Colour"), "type='coulour:Colour': No module.*PYTHONP"),
    (dict(type="colour:Color"), "colour lacks 'Color'. Did you mean 'Colour'"),
    (dict(type="colour:ColourHead"), "not a subclass of .*base.Objective"),
    (dict(type="colour:Colour", hiden=2), "Did you mean 'hidden'"),
    (dict(type="depth", head="colour:Colour"), "not a subclass of .*Predict"),
    (dict(type="depth", head="depth"), "head='depth': expected MODULE:NAME"),
    (dict(type="broken:Colour"), "broken can't be imported: No module.*'coul'"),
    (dict(type="plain:Mine", size=2), r"decorate it with @dataclasses\.data"),
  ],
)
def test_errors_name_what_was_expected(entry, message, plugins, unload):
  (plugins / "broken.py").write_text("import coul")
  (plugins / "plain.py").write_text(
    "from colour import Colour\nclass Mine(Colour):\n  size: int = 1"
  )
  with pytest.raises(ConfigError, match=message):
    build_objective("mine", entry)


def test_a_head_replaces_that_of_a_built_in_objective(unload):
  entry = dict(type="depth", head="colour:ColourHead", hidden=4)
  objective = build_objective("mine", entry)
  assert objective.heads().keys() == {"colour"} and objective.head.hidden == 4
  assert heads_of_config({"mine": entry}, None) == {"colour": objective.head}
  unload()
  heads = heads_of_config({"mine": entry}, None)
  assert heads == {"colour:ColourHead": UnloadedHead("colour:ColourHead")}


def test_two_objectives_may_not_predict_the_same(unload):
  class Other(importlib.import_module("colour").ColourHead):
    """Another class."""

  sys.modules["colour"].Other = Other
  entry = dict(type="depth", head="colour:Other")
  with pytest.raises(ConfigError, match="another objective predicts 'colour'"):
    heads_of_config({"a": dict(type="colour:Colour"), "b": entry}, None)


@pytest.mark.parametrize("name", ["colour:Renamed", "colour:f.<locals>.Head"])
def test_a_head_that_a_module_lacks_is_not_loaded(name, unload):
  importlib.import_module("colour")
  heads = described_heads({name: {"hidden": 8}})
  assert heads == {name: UnloadedHead(name, {"hidden": 8})}


def test_a_description_runs_no_code(unload):
  """Only heads are used, also if the module is imported."""
  with pytest.raises(ConfigError, match="system is not a subclass"):
    described_heads({"os:system": {"command": "true"}})
