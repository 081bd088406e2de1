"""The runs of a study: arms, omissions, lengths, seeds."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.config import overrides, recipes
from mtv_jax.config.durations import RunLength
from mtv_jax.data import pipeline, tokenizers
from mtv_jax.studies import arms as arms_lib
from mtv_jax.studies.expand import expand
from mtv_jax.train.build_step import build_step_spec
from mtv_jax.train.gradients import view_keys
from mtv_jax.train.run import resolve
from mtv_jax.train.spec import init_params
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

TINY = "mtv_tiny:tiny"
SSL = {"dino", "ibot", "mae"}


def trained(study):
  """Objectives by arm."""
  return {run.arm: {*run.settings["objectives"]} for run in study.runs}


def evaluated(study):
  return {run.arm: {*run.settings["evals"]} for run in study.runs}


def write_recipe(folder: pathlib.Path, body: str) -> str:
  """A recipe that changes mtv_tiny."""
  file = folder / "recipe.py"
  file.write_text(
    "from mtv_jax.config.recipes import read_config\n\n\n"
    "def get_config(arg=None):\n"
    f"  config = read_config('{TINY}')\n"
    + "".join(f"  {line}\n" for line in body.splitlines())
    + "  return config\n"
  )
  return str(file)


def test_each_teacher_alone_and_all_of_them(tmp_path):
  """A teacher is one entry: without it, its losses and heads are gone."""
  recipe = write_recipe(
    tmp_path,
    "shape = dict(variant='mu/8', image_size=16, depth=1)\n"
    "config.teachers = dict(a=dict(path='a', model=shape))\n"
    "config.teachers.b = dict(path='b', model={**shape, 'width': 32})\n"
    "config.objectives = dict(feature_distillation={})\n"
    "config.model.text, config.evals = None, {}\n",
  )
  study = expand("teachers", recipe)
  assert {run.arm: {*run.settings["teachers"]} for run in study.runs} == {
    "a": {"a"}, "b": {"b"}, "a+b": {"a", "b"},
  }  # fmt: skip
  heads = {
    run.arm: {*build_step_spec(resolve(run.settings), 9).heads}
    for run in study.runs
  }
  assert heads["a+b"] == heads["a"] | heads["b"]
  assert heads["a"] == {"adaptor_a_patches", "adaptor_a_pooled"}


def test_ladder_of_every_objective():
  study = expand("ladder", TINY)
  assert trained(study) == {
    "vl": {"contrastive"},
    "ssl": {"contrastive"} | SSL,
    "grounding": {"contrastive", "grounding"} | SSL,
    "depth": {"contrastive", "grounding", "depth"} | SSL,
  }
  # Only the last arm has the depth head; boxes can be cropped in all.
  common = {"zero_shot", "retrieval", "grounding"}
  assert evaluated(study) == {
    "vl": common, "ssl": common, "grounding": common,
    "depth": common | {"relative_depth"},
  }  # fmt: skip
  assert study.baseline == "vl" and study.notes == ()
  assert {run.steps for run in study.runs} == {30}
  assert {run.images for run in study.runs} == {30 * 32}
  # The full arm is the config itself, but for sheets.
  whole = resolve(recipes.read_config(TINY)).to_dict()
  assert (
    study.runs[-1].settings["objectives"].keys() == whole["objectives"].keys()
  )


def test_overrides_repeat_the_run_in_the_training_command():
  study = expand("leave_one_out", TINY, assignments=["optim.lr=0.5"], seeds="2")
  for run in study.runs:
    config = overrides.override(recipes.read_config(TINY), run.overrides)
    config = resolve(config)
    assert config.optim.lr == 0.5 and config.seed == run.seed
    assert {*config.objectives} == {*run.settings["objectives"]}
    assert {*config.evals} == {*run.settings["evals"]}


def test_leave_one_out_and_pairs():
  study = expand("leave_one_out", TINY)
  assert study.baseline == "all"
  assert trained(study)["without_ssl"] == {"contrastive", "grounding", "depth"}
  assert trained(study)["without_vl"] == {"grounding", "depth"} | SSL
  # Phrases of boxes still train the text tower.
  assert "zero_shot" in evaluated(study)["without_vl"]
  study = expand("pairs", TINY)
  assert list(trained(study)) == [
    "vl", "ssl", "grounding", "depth", "vl+ssl", "vl+grounding", "vl+depth",
    "ssl+grounding", "ssl+depth", "grounding+depth",
  ]  # fmt: skip
  assert trained(study)["grounding+depth"] == {"grounding", "depth"}
  # Without a text tower nothing is compared with texts.
  assert evaluated(study)["ssl+depth"] == {"relative_depth"}
  (run,) = [run for run in study.runs if run.arm == "ssl+depth"]
  assert run.settings["model"]["text"] is None


def test_groups_that_a_config_lacks_are_told_and_others_are_arms(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "del config.objectives.depth\n"
    "second = config.objectives.contrastive.to_dict() | {'weight': 0.5}\n"
    "config.objectives.second = second | {'type': 'contrastive'}\n"
    "config.evals = dict(retrieval=dict())",
  )
  study = expand("ladder", recipe)
  assert list(trained(study)) == ["vl", "ssl", "grounding"]
  assert trained(study)["vl"] == {"contrastive", "second"}
  assert len(study.notes) == 1 and "'depth'" in study.notes[0]
  options = arms_lib.Options(groups=("grounding", "vl"))
  assert trained(expand("ladder", recipe, options=options)) == {
    "grounding": {"grounding"},
    "vl": {"grounding", "contrastive", "second"},
  }
  with pytest.raises(ConfigError, match="--groups=depth.*There are: ground"):
    expand("ladder", recipe, options=arms_lib.Options(groups=("depth",)))
  with pytest.raises(ConfigError, match="one arm .'vl'. of a ladder"):
    options = arms_lib.Options(groups=("vl",))
    expand("ladder", recipe, options=options)


def test_rules_and_teacher_weights_of_what_an_arm_lacks_are_left_out(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "config.optim.rules = [('^heads/depth/', dict(lr=0.5)),"
    " ('bias$', dict(lr=2.0))]\n"
    "config.weights = 'teacher'\n"
    "config.evals.retrieval.weights = 'teacher'",
  )
  runs = {run.arm: run.settings for run in expand("ladder", recipe).runs}
  assert [r[0] for r in runs["vl"]["optim"]["rules"]] == ["bias$"]
  assert len(runs["depth"]["optim"]["rules"]) == 2
  assert runs["vl"]["weights"] == "student"
  assert runs["vl"]["evals"]["retrieval"]["weights"] == "student"
  assert runs["ssl"]["weights"] == "teacher"
  assert runs["ssl"]["evals"]["retrieval"]["weights"] == "teacher"


def test_seeds_by_arm_come_round_by_round():
  study = expand("ladder", TINY, seeds="vl:3,depth:2,1")
  assert [run.name for run in study.runs] == [
    "vl-s0", "ssl-s0", "grounding-s0", "depth-s0", "vl-s1", "depth-s1",
    "vl-s2",
  ]  # fmt: skip
  assert [run.settings["seed"] for run in study.runs][-1] == 2
  for text, message in {
    "0": "not a number of seeds", "vl:x": "not a number", "ssd:2": "'ssl'",
    "": "not a number", "2,": "not a number", "-1": "not a number",
    "2,3": "two numbers for the other arms", "vl:2,vl:3": "numbers for 'vl'",
  }.items():  # fmt: skip
    with pytest.raises(ConfigError, match=message):
      expand("ladder", TINY, seeds=text)


def test_budget_scales_the_schedules(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "config.total_steps = None\n"
    "config.total_examples = 3200\n"
    "config.schedule = dict(name='cosine', warmup_steps=20)\n"
    "weight = dict(start_steps=40, ramp_percent=10)\n"
    "config.objectives.depth = dict(weight=weight)",
  )
  study = expand("ladder", recipe, budget=0.25)
  # The dropped objective stays dropped.
  assert trained(study)["vl"] == {"contrastive"}
  settings = study.runs[-1].settings
  assert study.runs[-1].steps == settings["total_steps"] == 25
  assert "total_examples" not in settings
  assert settings["schedule"]["warmup_steps"] == 5
  weight = settings["objectives"]["depth"]["weight"]
  assert weight["start_steps"] == 10 and weight["ramp_percent"] == 10
  with pytest.raises(ConfigError, match="--budget=2"):
    expand("ladder", recipe, budget=2.0)


def test_durations_in_epochs_are_those_of_all_images(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "config.data.train[0]['length'] = 320\n"  # An epoch is 10 steps of 32.
    "config.total_steps = 40\n"
    "config.schedule = dict(name='cosine', warmup_epochs=1)\n"
    "config.optim.rules = [('^text/', dict(lr=0.5, start_epochs=2))]\n"
    "weight = dict(start_epochs=2, ramp_examples=320)\n"
    "config.objectives.depth = dict(weight=weight)",
  )
  options = arms_lib.Options(images=(80, 160))
  for budget, start in ((1.0, 20), (0.5, 10)):
    study = expand("scaling", recipe, options=options, budget=budget)
    for run in study.runs:
      config = resolve(run.settings)
      length = RunLength.of_total(
        config.total, config.batch_size, config.data.train[0]["limit"]
      )
      assert run.steps == length.total_steps == 2 * start
      assert length.steps(config.schedule.warmup) == start / 2
      weight = config.objectives["depth"].weight
      assert length.steps(weight.start) == start
      assert length.steps(weight.ramp) == start / 2
      ((_, rule),) = config.optim.rules
      assert rule == dict(lr=0.5, start_epochs=None, start_steps=start)
  options = arms_lib.Options(images=(80, 321))
  with pytest.raises(ConfigError, match="images=321.*has 320 records"):
    expand("scaling", recipe, options=options)


def test_equal_flops_are_those_of_the_whole_config():
  def cost(settings):
    return float(len(settings["objectives"]))

  study = expand("ladder", TINY, match="flops", cost_fn=cost, seeds="2")
  steps = {run.arm: run.steps for run in study.runs}
  assert steps == {"vl": 180, "ssl": 45, "grounding": 36, "depth": 30}
  assert {run.flops for run in study.runs} == {30 * 32 * 6.0}
  # Known costs are not counted again: seeds and lengths share them.
  again = expand(
    "ladder", TINY, match="flops", seeds="2", costs=study.costs,
    cost_fn=lambda settings: pytest.fail("counted again"),
  )  # fmt: skip
  assert again.fingerprint == study.fingerprint
  assert len(study.costs) == 4


def test_scaling_of_models_and_images(tmp_path):
  options = arms_lib.Options(
    models=("mu/8", "wide:width=96,text.width=96"), images=(100, 1000)
  )
  study = expand("scaling", TINY, options=options)
  runs = {run.arm: run.settings for run in study.runs}
  assert list(runs) == ["mu-100", "mu-1000", "wide-100", "wide-1000"]
  assert runs["mu-100"]["data"]["train"][0]["limit"] == 100
  assert runs["wide-1000"]["model"]["width"] == 96
  assert runs["wide-1000"]["model"]["text"]["width"] == 96
  assert {run.images for run in study.runs} == {30 * 32}
  recipe = write_recipe(tmp_path, "config.model.width = 32")
  with pytest.raises(ConfigError, match="sets width itself"):
    expand("scaling", recipe, options=options)
  with pytest.raises(ConfigError, match="option of scaling, not of ladder"):
    expand("ladder", TINY, options=options)


def test_balance_of_methods_and_weights(tmp_path):
  options = arms_lib.Options(weights=("small:depth=0.1,contrastive=2",))
  study = expand("balance", TINY, options=options)
  runs = {run.arm: run.settings for run in study.runs}
  assert list(runs)[:2] == ["fixed", "small"] and study.baseline == "fixed"
  assert {*runs} == {"fixed", "small", *arms_lib.balance_methods()}
  assert runs["fixed"]["balance"] is None
  assert runs["grad_norm_mean"]["balance"] is not None
  assert runs["small"]["objectives"]["depth"]["weight"] == 0.1
  # Other methods don't inherit the options of the config's method.
  study = expand(
    "balance", TINY, assignments=["balance=dict(every_steps=7, decay=0.5)"],
    options=arms_lib.Options(methods=("grad_norm_mean", "gradnorm")),
  )  # fmt: skip
  own, other = (run.settings["balance"] for run in study.runs[1:])
  assert study.runs[0].settings["balance"] is None
  assert own == dict(method="grad_norm_mean", every_steps=7, decay=0.5)
  assert other == dict(method="gradnorm")
  with pytest.raises(ConfigError, match="Did you mean 'depth'"):
    options = arms_lib.Options(weights=("a:depht=1",))
    expand("balance", TINY, options=options)


@pytest.mark.parametrize(
  ("kind", "options", "message"),
  [
    ("ladder", dict(groups=("vl", "ssl", "vl")), "has 'vl' twice"),
    ("ladder", dict(groups=("vl", "sll")), "Did you mean 'ssl'"),
    ("scaling", dict(images=(100, 0)), "a positive number"),
    ("scaling", dict(models=("mu/8", "a:")), "write NAME:KEY=VALUE"),
    # A run's folder would be outside the study's.
    ("scaling", dict(models=("mu/8", "../a:width=96")), "name '../a-all'"),
    ("balance", dict(weights=(":depth=1",)), "has the name ''"),
    ("balance", dict(weights=("a,b:depth=1",)), "has the name 'a,b'"),
    ("balance", dict(weights=("<b>:depth=1",)), "has the name '<b>'"),
    ("balance", dict(weights=("fixed:depth=1",)), "two arms"),
  ],
)
def test_arms_that_can_not_be_run(kind, options, message):
  with pytest.raises(ConfigError, match=message):
    expand(kind, TINY, options=arms_lib.Options(**options))


def test_options_of_the_optimizer_are_checked():
  with pytest.raises(ConfigError, match="lrr"):
    expand("ladder", TINY, assignments=["optim.lrr=1"])
  with pytest.raises(ConfigError, match="warmpu"):
    expand("ladder", TINY, assignments=["schedule.warmpu_steps=1"])


def test_an_error_names_the_arm(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "config.objectives.contrastive = dict(weight=dict(start_steps=5))",
  )
  with pytest.raises(ConfigError, match="must start at step 0") as error:
    expand("ladder", recipe)
  assert "'vl'" in error.value.__notes__[0]


def test_a_study_survives_its_json():
  study = expand("ladder", TINY)
  fields = study.to_dict()
  assert fields["format"] == 1 and fields["fingerprint"] == study.fingerprint
  assert type(study).from_dict(fields) == study
  assert resolve(study.runs[0].settings).objectives


@pytest.mark.slow
def test_runs_of_a_seed_share_parameters_rows_and_crops():
  runs = {run.arm: run for run in expand("ladder", TINY).runs}
  specs, params, batches, keys = {}, {}, {}, {}
  for arm in ("vl", "depth"):
    config = resolve(runs[arm].settings)
    spec = specs[arm] = build_step_spec(config, 100)
    tree = init_params(spec, jax.random.key(config.seed))
    params[arm] = dict(flatten_with_names(tree))
    loader = pipeline.make_loader(
      config.data, batch_size=4, seed=config.seed,
      tokenizer=tokenizers.build_tokenizer("bytes"), wanted=spec.fields(),
    )  # fmt: skip
    with loader:
      batches[arm] = [next(loader) for _ in range(2)]
    keys[arm] = view_keys(spec, jnp.int32(1), 4, None)
  assert {*batches["vl"][0]} < {*batches["depth"][0]}
  assert {*params["vl"]} < {*params["depth"]}
  assert "heads/contrastive/logit_bias" in params["vl"]
  for first, second in zip(*batches.values(), strict=True):
    for field, rows in first.items():
      np.testing.assert_array_equal(rows, second[field], err_msg=field)
  for name, leaf in params["vl"].items():
    np.testing.assert_array_equal(leaf, params["depth"][name], err_msg=name)
  assert {*keys["vl"]} == {"image"}
  assert (keys["vl"]["image"] == keys["depth"]["image"]).all()
