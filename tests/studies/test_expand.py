"""The runs of a study: arms, omissions, lengths, seeds."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.config import overrides, recipes
from mtv_jax.config.durations import RunLength
from mtv_jax.data import pipeline, registry, tokenizers
from mtv_jax.studies import arms as arms_lib
from mtv_jax.studies.arms import Options
from mtv_jax.studies.expand import expand
from mtv_jax.train.config import resolve
from mtv_jax.train.gradients import view_keys
from mtv_jax.train.run import build_spec
from mtv_jax.train.spec import init_params
from mtv_jax.utils.errors import ConfigError, UserError
from mtv_jax.utils.tree import flatten_with_names

TINY = "mtv_tiny:tiny"
SSL = {"dino", "ibot", "mae"}
TWO = Options(groups=("vl", "depth"))
# Overrides that leave contrast and depth.
SMALL = [f"objectives.{name}=None" for name in (*SSL, "grounding")]


def keys_of(study, section):
  """Objectives, evaluations or teachers by arm."""
  return {run.arm: {*run.settings[section]} for run in study.runs}


def write_recipe(folder: pathlib.Path, *lines: str) -> str:
  """A recipe that changes mtv_tiny."""
  file = folder / "recipe.py"
  file.write_text(
    "from mtv_jax.config.recipes import read_config\n\n\n"
    "def get_config(arg=None):\n"
    f"  config = read_config('{TINY}')\n"
    + "".join(f"  {line}\n" for line in lines)
    + "  return config\n"
  )
  return str(file)


@pytest.fixture(scope="module")
def ladder():
  return expand("ladder", TINY, seeds="vl:3,depth:2,1")


def test_each_teacher_alone_and_all_of_them(tmp_path):
  """A teacher is one entry: without it, its losses and heads are gone."""
  recipe = write_recipe(
    tmp_path,
    "shape = dict(variant='mu/8', image_size=16, depth=1)",
    "config.teachers = dict(a=dict(path='a', model=shape))",
    "config.teachers.b = dict(path='b', model={**shape, 'width': 32})",
    "config.objectives = dict(feature_distillation={})",
    "config.model.text, config.evals = None, {}",
  )
  study = expand("teachers", recipe)
  expected = {"a": {"a"}, "b": {"b"}, "a+b": {"a", "b"}}
  assert keys_of(study, "teachers") == expected
  heads = {
    run.arm: {*build_spec(resolve(run.settings), 9).heads} for run in study.runs
  }
  assert heads["a+b"] == heads["a"] | heads["b"]
  assert heads["a"] == {"adaptor_a_patches", "adaptor_a_pooled"}


def test_ladder_of_every_objective(ladder):
  assert keys_of(ladder, "objectives") == {
    "vl": {"contrastive"},
    "ssl": {"contrastive"} | SSL,
    "grounding": {"contrastive", "grounding"} | SSL,
    "depth": {"contrastive", "grounding", "depth"} | SSL,
  }
  # Only the last arm has the depth head; boxes can be cropped in all.
  common = {"zero_shot", "retrieval", "grounding"}
  assert keys_of(ladder, "evals") == {
    "vl": common, "ssl": common, "grounding": common,
    "depth": common | {"relative_depth"},
  }  # fmt: skip
  assert ladder.baseline == "vl" and ladder.notes == ()
  assert {run.steps for run in ladder.runs} == {30}
  assert {run.images for run in ladder.runs} == {30 * 32}
  # The full arm is the config itself, but for sheets.
  whole = resolve(recipes.read_config(TINY)).to_dict()
  full = next(run for run in ladder.runs if run.arm == "depth")
  assert full.settings["objectives"].keys() == whole["objectives"].keys()


def test_seeds_by_arm_come_round_by_round(ladder):
  assert [run.name for run in ladder.runs] == [
    "vl-s0", "ssl-s0", "grounding-s0", "depth-s0", "vl-s1", "depth-s1",
    "vl-s2",
  ]  # fmt: skip
  assert [run.settings["seed"] for run in ladder.runs][-1] == 2


def test_a_study_survives_its_json(ladder):
  fields = ladder.to_dict()
  assert fields["format"] == 1 and fields["fingerprint"] == ladder.fingerprint
  assert type(ladder).from_dict(json.loads(json.dumps(fields))) == ladder
  pairs = ladder.family.comparisons
  assert pairs == (("ssl", "vl"), ("grounding", "vl"), ("depth", "vl"))
  assert ladder.family.seeds["depth"] == 2
  assert {"zero_shot", "relative_depth"} <= {*ladder.family.evaluations}
  assert resolve(ladder.runs[0].settings).objectives


@pytest.mark.slow
def test_leave_one_out_repeats_in_the_training_command():
  options = Options(groups=("vl", "ssl", "grounding"))
  study = expand(
    "leave_one_out", TINY, assignments=["optim.lr=0.5"], seeds="2",
    options=options,
  )  # fmt: skip
  for run in study.runs:
    config = overrides.override(recipes.read_config(TINY), run.overrides)
    settings = resolve(config).to_dict()
    assert settings["optim"]["lr"] == 0.5 and settings == run.settings
  objectives = keys_of(study, "objectives")
  assert study.baseline == "all"
  assert objectives["without_ssl"] == {"contrastive", "grounding"}
  assert objectives["without_vl"] == {"grounding"} | SSL
  # Phrases of boxes still train the text tower.
  assert "zero_shot" in keys_of(study, "evals")["without_vl"]
  # As earlier versions recorded it, so that their studies resume.
  evals = study.runs[0].settings["evals"]
  drawn = {name for name, entry in evals.items() if "pictures" in entry}
  assert drawn == {*evals} - {"zero_shot"}


@pytest.mark.slow
def test_pairs():
  options = Options(groups=("vl", "ssl", "depth"))
  study = expand("pairs", TINY, options=options)
  objectives = keys_of(study, "objectives")
  pairs = ["vl+ssl", "vl+depth", "ssl+depth"]
  assert list(objectives) == ["vl", "ssl", "depth", *pairs]
  assert objectives["ssl+depth"] == {"depth"} | SSL
  tested = [(pair, part) for pair in pairs for part in pair.split("+")]
  assert study.family.comparisons == tuple(tested)
  # Without a text tower nothing is compared with texts.
  assert keys_of(study, "evals")["ssl+depth"] == {"relative_depth"}
  assert study.runs[-1].settings["model"]["text"] is None


def test_groups_that_a_config_lacks_are_told_and_others_are_arms(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "del config.objectives.depth, config.objectives.dino",
    "second = config.objectives.contrastive.to_dict() | {'weight': 0.5}",
    "config.objectives.second = second | {'type': 'contrastive'}",
    "config.evals = dict(retrieval=dict())",
  )
  study = expand("ladder", recipe)
  objectives = keys_of(study, "objectives")
  assert list(objectives) == ["vl", "ssl", "grounding"]
  assert objectives["vl"] == {"contrastive", "second"}
  assert len(study.notes) == 1 and "'depth'" in study.notes[0]
  options = Options(groups=("grounding", "vl"))
  study = expand("ladder", recipe, options=options)
  assert keys_of(study, "objectives") == {
    "grounding": {"grounding"},
    "vl": {"grounding", "contrastive", "second"},
  }
  for groups, message in (
    (("depth",), "--groups=depth.*There are: ground"),
    (("vl",), "only the arms .'vl'. of a ladder"),
  ):
    with pytest.raises(ConfigError, match=message):
      expand("ladder", recipe, options=Options(groups=groups))


def test_rules_and_teacher_weights_of_what_an_arm_lacks_are_left_out(tmp_path):
  rules = "[('^heads/depth/', dict(lr=0.5)), ('bias$', dict(lr=2.0))]"
  recipe = write_recipe(
    tmp_path,
    f"config.optim.rules = {rules}",
    "config.weights = 'teacher'",
    "config.evals.retrieval.weights = 'teacher'",
  )
  options = Options(groups=("vl", "ssl", "depth"))
  study = expand("ladder", recipe, options=options)
  runs = {run.arm: run.settings for run in study.runs}
  assert [r[0] for r in runs["vl"]["optim"]["rules"]] == ["bias$"]
  assert len(runs["depth"]["optim"]["rules"]) == 2
  for arm, weights in (("vl", "student"), ("ssl", "teacher")):
    assert runs[arm]["weights"] == weights
    assert runs[arm]["evals"]["retrieval"]["weights"] == weights


def test_budget_scales_the_schedules(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "config.total_steps = None",
    "config.total_examples = 3200",
    "config.schedule = dict(name='cosine', warmup_steps=20)",
    "weight = dict(start_steps=40, ramp_percent=10)",
    "config.objectives.depth = dict(weight=weight)",
    "dense = dict(type='depth', weight=weight)",
    "config.objectives.update({'dense-2': dense})",
  )
  longer = expand("ladder", recipe, budget=4.0, options=TWO).runs[-1]
  assert longer.steps == longer.settings["total_steps"] == 400
  assert longer.settings["schedule"]["warmup_steps"] == 80
  study = expand("ladder", recipe, budget=0.25, options=TWO)
  # The dropped objective stays dropped.
  assert keys_of(study, "objectives")["vl"] == {"contrastive"}
  settings = study.runs[-1].settings
  assert study.runs[-1].steps == settings["total_steps"] == 25
  assert "total_examples" not in settings
  assert settings["schedule"]["warmup_steps"] == 5
  for name in ("depth", "dense-2"):
    weight = settings["objectives"][name]["weight"]
    assert weight["start_steps"] == 10 and weight["ramp_percent"] == 10


def test_durations_in_epochs_are_those_of_all_images(tmp_path):
  recipe = write_recipe(
    tmp_path,
    "config.data.train[0]['length'] = 320",  # An epoch is 10 steps of 32.
    "config.total_steps = 40",
    "config.schedule = dict(name='cosine', warmup_epochs=1)",
    "config.optim.rules = [('^text/', dict(lr=0.5, start_epochs=2))]",
    "weight = dict(start_epochs=2, ramp_examples=320)",
    "objectives = dict(depth=dict(weight=weight))",
    "config.objectives = dict(contrastive=dict(init_bias=-2.0)) | objectives",
  )
  options = Options(images=(80, 160))
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
  options = Options(images=(80, 321))
  with pytest.raises(ConfigError, match="images=321.*has 320 records"):
    expand("scaling", recipe, options=options)


def test_equal_flops_are_those_of_the_whole_config():
  options = dict(match="flops", seeds="2", assignments=SMALL)

  def cost(settings):
    return float(len(settings["objectives"]))

  study = expand("ladder", TINY, cost_fn=cost, **options)
  assert {run.arm: run.steps for run in study.runs} == {"vl": 60, "depth": 30}
  assert {run.flops for run in study.runs} == {30 * 32 * 2.0}
  # Known costs are not counted again: seeds and lengths share them.
  options |= dict(costs=study.costs, cost_fn=lambda _: pytest.fail("counted"))
  assert expand("ladder", TINY, **options).fingerprint == study.fingerprint
  assert len(study.costs) == 2  # The last arm is the config.


def test_scaling_of_models_and_images(tmp_path):
  models = "mu/8", "wide:width=96,text.width=96"
  config = resolve(recipes.read_config(TINY))
  options = Options(models=models, images=(100, 1000))
  arms, _ = arms_lib.make_arms("scaling", config, options)
  names = ["mu-100", "mu-1000", "wide-100", "wide-1000"]
  assert [arm.name for arm in arms] == names
  options = Options(models=models[1:], images=(100, 1000))
  study = expand("scaling", TINY, options=options, assignments=SMALL)
  for run, images in zip(study.runs, (100, 1000), strict=True):
    assert run.settings["data"]["train"][0]["limit"] == images
    assert run.settings["model"]["width"] == 96
    assert run.settings["model"]["text"]["width"] == 96
    assert run.images == 30 * 32
  recipe = write_recipe(tmp_path, "config.model.width = 32")
  with pytest.raises(ConfigError, match="sets width itself"):
    expand("scaling", recipe, options=Options(models=models))


def test_balance_of_methods_and_weights():
  weights = ("small:depth=0.1,contrastive=2",)
  config = resolve(recipes.read_config(TINY))
  arms, _ = arms_lib.make_arms("balance", config, Options(weights=weights))
  names = [arm.name for arm in arms]
  assert names == ["fixed", "small", *arms_lib.balance_methods()]
  # Other methods don't inherit the options of the config's method.
  study = expand(
    "balance", TINY,
    assignments=[*SMALL, "balance=dict(every_steps=7, decay=0.5)"],
    options=Options(methods=("grad_norm_mean", "gradnorm"), weights=weights),
  )  # fmt: skip
  fixed, small, own, other = (run.settings for run in study.runs)
  assert study.baseline == "fixed" and fixed["balance"] is None
  assert small["objectives"]["depth"]["weight"] == 0.1
  expected = dict(method="grad_norm_mean", every_steps=7, decay=0.5)
  assert own["balance"] == expected
  assert other["balance"] == dict(method="gradnorm")


def test_custom_arms_of_a_file(tmp_path):
  file = tmp_path / "arms.json"
  arms = {"base": [], "depth_2": ["objectives.depth.weight=2"]}
  arms["family"] = ["base:depth_2"]
  file.write_text(json.dumps(arms))
  options = dict(options=Options(arms=str(file)), seeds="2")
  study = expand("custom", TINY, **options)
  assert study.family.comparisons == (("base", "depth_2"),)
  flag = expand("custom", TINY, family="depth_2:base", **options)
  assert flag.family.comparisons == (("depth_2", "base"),)
  weights = {
    run.name: run.settings["objectives"]["depth"]["weight"]
    for run in study.runs
  }
  expected = {"base-s0": 0.5, "depth_2-s0": 2.0, "base-s1": 0.5}
  assert weights == {**expected, "depth_2-s1": 2.0}
  for text, error in (
    ('{"base": "objectives.depth.weight=2"}', r"Write {NAME: \[OVERRIDE"),
    ('{"base": [], "a": [], "a": []}', "two arms have the name 'a'"),
    ('{"base": [', "is not JSON"),
    # The run's config would differ from the study's record of it.
    ('{"base": [], "a": ["seed=5"]}', "an arm can't set the seed"),
    ('{"base": [], "a": ["total_steps=5"]}', "the length of its runs"),
    ('{"base": [], "a": [], "family": ["a:b"]}', "a:b is not ARM:BASELINE"),
  ):
    file.write_text(text)
    with pytest.raises(UserError, match=error):
      expand("custom", TINY, options=Options(arms=str(file)))
  with pytest.raises(UserError, match="no such file"):
    expand("custom", TINY, options=Options(arms=str(tmp_path / "no.json")))


@pytest.mark.slow
def test_plan_of_self_supervised_terms(repo_root):
  plan = repo_root / "docs" / "study" / "plans" / "ssl.json"
  study = expand("custom", "study:tiny", options=Options(arms=str(plan)))
  objectives, evals = keys_of(study, "objectives"), keys_of(study, "evals")
  parts = {
    "": set(), "vl": {"contrastive"},
    "dense": {"contrastive", "grounding", "depth"},
  }  # fmt: skip
  assert study.baseline == "vl" and objectives["vl"] == parts["vl"]
  # Each term added to a part, against the part.
  expected = [(arm, arm.split("+")[0]) for arm in objectives if "+" in arm]
  assert study.family.comparisons == tuple(expected) and len(expected) == 14
  needs = {"zero_shot": "contrastive", "retrieval": "contrastive"}
  needs |= {"grounding": "contrastive", "relative_depth": "depth"}
  terms = {term for arm in objectives for term in arm.split("+")[1:]}
  assert {f"{part}+{t}" for part in ("vl", "dense") for t in terms} | terms == {
    *objectives
  } - {"vl", "dense"}
  for run in study.runs:
    part, _, term = run.arm.rpartition("+")
    if term in parts:
      continue
    own = {*term.split("_")} - {"koleo"}
    assert objectives[run.arm] == parts[part] | own
    entries = run.settings["objectives"]
    weight = entries.get("dino", {}).get("koleo_weight", 0)
    assert (weight > 0) == ("koleo" in term)
    for name, needed in needs.items():
      assert (name in evals[run.arm]) == (needed in entries), (run.arm, name)
    assert "feature_rank" in evals[run.arm]


@pytest.mark.parametrize(
  ("kind", "options", "message"),
  [
    ("ladder", dict(groups=("vl", "ssl", "vl")), "has 'vl' twice"),
    ("ladder", dict(groups=("vl", "sll")), "Did you mean 'ssl'"),
    ("ladder", dict(images=(9,)), "option of scaling, not of ladder"),
    ("scaling", dict(images=(100, 0)), "a positive number"),
    ("scaling", dict(models=("mu/8", "a:")), "write NAME:KEY=VALUE"),
    # A run's folder would be outside the study's.
    ("scaling", dict(models=("mu/8", "../a:width=96")), "name '../a-all'"),
    ("balance", dict(weights=("a:depht=1",)), "Did you mean 'depth'"),
    ("balance", dict(weights=(":depth=1",)), "has the name ''"),
    ("balance", dict(weights=("a,b:depth=1",)), "has the name 'a,b'"),
    ("balance", dict(weights=("<b>:depth=1",)), "has the name '<b>'"),
    ("balance", dict(weights=("fixed:depth=1",)), "two arms"),
  ],
)
def test_arms_that_can_not_be_run(kind, options, message):
  with pytest.raises(ConfigError, match=message):
    expand(kind, TINY, options=Options(**options))


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (dict(budget=0.0), "--budget=0"),
    (dict(budget=float("inf")), "--budget=inf"),
    (dict(assignments=["optim.lrr=1"]), "lrr"),
    (dict(assignments=["schedule.warmpu_steps=1"]), "warmpu"),
    (dict(seeds="0"), "not a number of seeds"),
    (dict(seeds="vl:x"), "not a number"),
    (dict(seeds="ssd:2"), "'ssl'"),
    (dict(seeds=""), "not a number"),
    (dict(seeds="2,"), "not a number"),
    (dict(seeds="-1"), "not a number"),
    (dict(seeds="2,3"), "two numbers for the other arms"),
    (dict(seeds="vl:2,vl:3"), "numbers for 'vl'"),
    (dict(family="depth:vl,ssl"), "ssl: is not ARM:BASELINE"),
  ],
)
def test_invalid_flags(flags, message):
  with pytest.raises(ConfigError, match=message):
    expand("ladder", TINY, **flags)


def test_an_error_names_the_arm():
  weight = "objectives.contrastive=dict(weight=dict(start_steps=5))"
  with pytest.raises(ConfigError, match="must start at step 0") as error:
    expand("ladder", TINY, assignments=[weight])
  assert "'vl'" in error.value.__notes__[0]


@pytest.mark.slow
def test_runs_of_a_seed_share_parameters_rows_and_crops(ladder):
  runs = {run.arm: run for run in ladder.runs if run.seed == 0}
  params, batches, keys = {}, {}, {}
  for arm in ("vl", "depth"):
    config = resolve(runs[arm].settings)
    spec = build_spec(config, 100)
    tree = init_params(spec, jax.random.key(config.seed))
    params[arm] = dict(flatten_with_names(tree))
    loader = pipeline.make_loader(
      config.data, batch_size=4, seed=config.seed,
      tokenizer=tokenizers.build_tokenizer("bytes"), batch_fields=spec.fields(),
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


def test_the_committed_plans_are_of_the_study(repo_root):
  # Recipes of plans that don't change `study`.
  bases = {
    "controls_photos": "study_photos",
    "teachers": "study:vl=RUN,ssl=RUN",
    "teachers_photos": "study_photos:vl=RUN,dinov2=FOLDER",
  }
  for file in (repo_root / "docs/study/plans").glob("*.json"):
    base = recipes.read_config(bases.get(file.stem, "study"))
    for teacher in base.get("teachers", {}).values():
      # Otherwise read from the run.
      teacher.model = dict(variant="mu/8", image_size=16, depth=1)
    made, _ = arms_lib.make_arms(
      "custom", resolve(base), Options(arms=str(file))
    )
    configs = [resolve(overrides.override(base, a.overrides)) for a in made]
    assert len({json.dumps(config.to_dict()) for config in configs}) == len(
      made
    )
    family = arms_lib.read_family(Options(arms=str(file)))
    assert {*family.replace(":", ",").split(",")} <= {
      "",
      *[a.name for a in made],
    }
    for entry in (config.data.train[0] for config in configs):
      if entry["type"] == "scenes":
        registry.build_source(entry)
