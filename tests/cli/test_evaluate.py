"""The command `evaluate`: from a folder to a table, JSON and a report."""

import argparse
import dataclasses
import functools
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mtv_jax.cli import arguments, evaluate
from mtv_jax.cli.main import run_command
from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals import retrieval, run, suite
from mtv_jax.evals.core import base, results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.encoder_requests import parse_requests
from mtv_jax.models import two_tower as models
from mtv_jax.report import tables
from mtv_jax.utils.errors import ConfigError, InputError

main = functools.partial(run_command, "evaluate")


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
  model = ConvertedModel(
    spec,
    {**params, "heads": {"contrastive": head}},
    Preprocess(size=16).to_dict(),
    TokenizerFiles(None, "lower"),
  )
  native.write(path, model)
  return path


@pytest.mark.slow
def test_all_evaluations_beside_a_baseline(folder, tmp_path, capsys):
  out = tmp_path / "out"
  argv = [f"--encoder={folder}", "--evals=all", "--count=6", "--pictures=2"]
  argv.append(f"--output={out}")
  # Among so few scenes, no two show objects of one class.
  argv += ["--set=semantic_correspondence.count=60"]
  for name in ("segmentation", "depth_probe", "linear_probe"):
    argv.append(f"--set={name}.steps=4")
  argv += ["--set=surface_normals.steps=4", "--set=finetune.epochs=1"]
  for name in ("knn", "few_shot", "linear_probe", "logistic", "mae_probe"):
    argv.append(f"--set={name}.train_count=120")
  argv += ["--set=logistic.max_iter=4", "--set=mae_probe.epochs=12"]
  argv += ["--set=knn.k=(10,)", "--set=few_shot.shots=(1,)"]
  main(argv)
  (first,) = results.read(out / "results.json")
  assert {*first.results, *first.skipped} == set(base.EVALUATORS)
  assert {"retrieval", "zero_shot"} <= {*first.results} and not first.failed
  for name in ("report.html", "results.md", "charts"):
    assert (out / name).stat().st_size
  assert (out / "sheets" / "retrieval_captions.png").is_file()
  for name, result in first.results.items():
    assert result.errors.keys() == result.metrics.keys(), name
    pattern = base.evaluator_class(name).metric_pattern or ".*"
    assert all(re.fullmatch(pattern, m) for m in result.metrics), name
    for key in ("data", "data_hash", "encoder", "seconds"):
      assert key in result.protocol, (name, key)
  # A baseline beside these results.
  argv = ["--encoder=pixels:16/8", "--evals=knn", "--count=6"]
  argv += [f"--compare={out}/results.json", f"--output={tmp_path}/floor"]
  main(argv)
  page = (tmp_path / "floor" / "results.md").read_text()
  for text in (page, capsys.readouterr().out):
    assert "pixels:16/8" in text and "untrained" in text


def test_errors_are_messages(folder, tmp_path):
  for changes, message in (
    (["--evals=retreival"], "evaluate: .*Did you mean 'retrieval'"),
    ([f"--encoder={tmp_path / 'none'}"], "does not exist"),
    (["--data=missing.json"], "(?s)does not exist.*'retrieval'"),
  ):
    with pytest.raises(SystemExit, match=message):
      main([f"--encoder={folder}", "--evals=retrieval", *changes])


def test_data_of_one_evaluation(folder, tmp_path, write_image):
  for colour in ("red", "blue"):
    write_image(tmp_path / "set" / colour / "0.png", colour)
  prompts = tmp_path / "prompts.json"
  prompts.write_text('{"classes": ["red", "blue", "white"]}')
  out = tmp_path / "out.json"
  argv = [f"--encoder={folder}", "--evals=zero_shot,retrieval", "--count=4"]
  argv += [f"--data=zero_shot={tmp_path / 'set'}", f"--prompts={prompts}"]
  main([*argv, f"--json={out}"])
  evals = json.loads(out.read_text())["evals"]
  assert evals["zero_shot"]["protocol"]["classes"] == 3
  assert evals["retrieval"]["protocol"]["data"] == "scenes"


def test_plan_passes_only_options_that_an_evaluation_has():
  got = run.plan(
    ["zero_shot", "retrieval"],
    data=["scenes", "retrieval=a=b.json"],
    options={"prompts": "p.json", "split": None, "count": 3},
    preferences={"count": 8, "pictures": 4, "unheard_of": 1},
    assignments=["retrieval.max_captions=5", "zero_shot.clean=canonicalize"],
  )
  assert got.entries == {
    "zero_shot": dict(
      type="zero_shot", data="scenes", prompts="p.json", count=3,
      clean="canonicalize",
    ),
    "retrieval": dict(
      type="retrieval", data="a=b.json", count=3, pictures=4, max_captions=5
    ),
  }  # fmt: skip
  assert got.named == {"zero_shot", "retrieval"}
  # The module of a plug-in may have dots.
  plugin = "mtv_jax.evals.classification.knn:KNN"
  got = run.plan([plugin], assignments=[f"{plugin}.temperature=0.2"])
  assert got.entries[plugin]["temperature"] == 0.2
  # Evaluations named besides all.
  got = run.plan(["all"])
  assert list(got.entries) == list(base.EVALUATORS) and not got.named
  got = run.plan(
    ["all"], data=["zero_shot=x"], assignments=["retrieval.count=1"]
  )
  assert got.named == {"zero_shot", "retrieval"}


def test_published_schedules_are_an_option_of_trained_probes():
  got = run.plan(["all"], options={"published": True})
  trained = [
    name for name, entry in got.entries.items() if "published" in entry
  ]
  probes = ["linear_probe", "mae_probe", "segmentation", "depth_probe"]
  probes.append("surface_normals")
  assert sorted(trained) == sorted(probes)
  parser = argparse.ArgumentParser()
  arguments.add_parameters(parser, evaluate.run)
  for flags, published in (([], False), (["--published"], True)):
    args = parser.parse_args(["--encoder=pixels:64", *flags])
    assert args.published is published


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"names": ["retreival"]}, "no evaluation.*Did you mean 'retrieval'"),
    ({"options": {"prompts": "x"}}, "--prompts: none of retrieval has"),
    ({"data": ["zero_shot=x"]}, "--data=zero_shot=...: zero_shot is not among"),
    ("max_captions=1", "expected NAME.OPTION=VALUE"),
    ("retrieval.count", "expected NAME.OPTION=VALUE"),
    ("retreival.count=1", "count=1: this.*Did you mean 'retrieval'"),
    ("retrieval.cuont=1", "no option 'cuont'. Did you mean 'count'"),
    ("retrieval.batch_size=many", "size=many: expected int, such as 64"),
    ("retrieval.batch_size.x=1", "batch_size.x: .* is 64, not a section"),
  ],
)
def test_invalid_plans_raise(changes, message):
  if isinstance(changes, str):
    changes = {"assignments": [changes]}
  arguments = {"names": ["retrieval"], **changes}
  with pytest.raises(ConfigError, match=message):
    run.plan(arguments.pop("names"), **arguments)


FAILURES = {
  "no text": (base.NotApplicable, "this encoder has no text tower"),
  "missing": (FileNotFoundError, "no such folder"),
  "corrupt": (InputError, "1.png can't be read"),
  "broken": (RuntimeError, "out of memory " + 5000 * "x"),
}


def fail(how):
  if how in FAILURES:
    kind, text = FAILURES[how]
    raise kind(text)


@dataclasses.dataclass(frozen=True)
class Made(base.Evaluator):
  """An evaluator that fails in a given way."""

  data: str = "scenes"
  pictures: int = 0
  prepares = runs = "well"

  def prepare(self):
    fail(self.prepares)

  def run(self, encoder):
    fail(self.runs)
    return Result({"x": 0.5}, {"data_hash": "1"})


@pytest.fixture
def register(monkeypatch):
  """Registers evaluations by name with the failures of their evaluator."""

  def register(**kinds):
    classes = {name: type(name, (Made,), kind) for name, kind in kinds.items()}
    paths = {name: f"{__name__}.{name}:{name}" for name in kinds}
    monkeypatch.setattr(base, "EVALUATORS", paths)
    find = lambda kind, where="": classes[kind]  # noqa: E731
    monkeypatch.setattr(base, "evaluator_class", find)

  return register


def outcomes_of(plan, encoder, **kwargs):
  said = []
  got = suite.evaluate({"colours": encoder}, plan, log_fn=said.append, **kwargs)
  return got, said


def test_a_failure_does_not_stop_other_evaluations(register, colours, tmp_path):
  how = dict(b="broken", c="no text", e="corrupt")
  register(**{name: {"runs": how.get(name, "well")} for name in "abcde"})
  plan = run.plan(["all"])
  (got,), said = outcomes_of(plan, colours, folder=tmp_path)
  assert said[0].startswith("colours: ")
  assert list(got.results) == ["a", "d"]
  assert got.skipped == {"c": "this encoder has no text tower"}
  assert got.failed["b"].startswith("RuntimeError: out of memory")
  assert len(got.failed["b"]) <= 1000
  # A user error has no traceback.
  assert got.failed["e"] == "InputError: 1.png can't be read"
  assert "e FAILED: 1.png can't be read" in said
  (traced,) = (line for line in said if "Traceback" in line)
  assert "b FAILED" in traced
  assert list(results.read(tmp_path / "results.json")[0].results) == ["a", "d"]
  line, _ = suite.errors([got], plan)
  assert line.startswith("b failed: RuntimeError")


def test_results_of_finished_evaluations_survive_a_crash(register, colours):
  register(a={}, b={}, c={})
  evaluators, *_ = run.prepare(run.plan(["all"]))
  outcome = results.Outcome("colours", "colours", "student")
  steps = run.attempt(colours, evaluators, outcome)
  assert [list(next(steps).results) for _ in "ab"] == [["a"], ["a", "b"]]


def test_skipped_is_an_error_only_by_name(register, colours):
  register(a={}, c={"runs": "no text"})
  plan = run.plan(["a", "c"])
  (got,), _ = outcomes_of(plan, colours)
  assert list(got.results) == ["a"]
  # A reason that encoders share appears once; different reasons all appear.
  line = "c can't be run: this encoder has no text tower"
  assert suite.errors([got], plan) == suite.errors([got, got], plan) == [line]
  assert suite.errors([got], run.plan(["all"])) == []
  lacks = dataclasses.replace(got, skipped={"c": "no depth head"})
  assert suite.errors([got, lacks, got], plan) == [f"{line}; no depth head"]
  # Another encoder can run it: the baseline is merely skipped.
  other = dataclasses.replace(got, skipped={}, results={"c": got.results["a"]})
  assert suite.errors([got, other], plan) == []


def test_data_that_cannot_be_opened_are_errors(register, colours):
  register(a={}, b={"prepares": "missing"}, c={"prepares": "no text"})
  plan = run.plan(["all"])
  (got,), said = outcomes_of(plan, colours)
  assert list(got.results) == ["a"]
  assert got.failed == {"b": "no such folder"}
  assert "b FAILED: no such folder" in said
  assert got.skipped == {"c": "this encoder has no text tower"}
  # If selected by name, a mistake is an error before anything is computed.
  for plan in (run.plan(["a", "b"]), run.plan(["all"], data=["b=x"])):
    with pytest.raises(FileNotFoundError):
      outcomes_of(plan, colours)
  register(b={"prepares": "missing"})
  with pytest.raises(FileNotFoundError):
    outcomes_of(run.plan(["all"]), colours)


def test_command_fails_with_the_failed_evaluations(
  folder, tmp_path, monkeypatch
):
  broken = mock.Mock(side_effect=RuntimeError("boom"))
  monkeypatch.setattr(retrieval.Retrieval, "run", broken)
  out = tmp_path / "out"
  argv = [f"--encoder={folder}", "--evals=retrieval,zero_shot", "--count=4"]
  with pytest.raises(SystemExit, match="retrieval failed: RuntimeError: boom"):
    main([*argv, f"--output={out}"])
  (outcome,) = results.read(out / "results.json")
  assert list(outcome.results) == ["zero_shot"]
  assert "retrieval: RuntimeError: boom" in (out / "results.md").read_text()


@pytest.mark.parametrize(
  ("given", "names"),
  [
    ("runs/a", "a"),
    ("runs/a pixels:64 random:mu/8@64", "a pixels:64 random:mu/8@64"),
    ("x/a y/a", "x/a y/a"),
    ("runs/a runs/a@ema", "a@student a@ema"),
    ("/a", "a"),
    (". a", ". a"),
  ],
)
def test_names_of_encoders(given, names):
  given = given.split()
  requests = parse_requests(given, weights="student")
  assert [r.name for r in requests] == names.split()
  assert [f"{r.path}@{r.weights}" for r in requests] == [
    g if g.endswith("@ema") else f"{g}@student" for g in given
  ]
  # Baselines ignore weights.
  requests = parse_requests(["runs/a", "pixels:64"], weights="ema")
  assert [r.weights for r in requests] == ["ema", "student"]
  with pytest.raises(ValueError, match="the encoder a is given twice"):
    parse_requests(["a", "a@ema"], weights="ema")


def test_all_requests_are_checked_before_loading(colours):
  evals = {"zero_shot": {"count": 4}, "b": {"type": "retrieval", "cuont": 1}}
  with pytest.raises(ConfigError, match="Did you mean 'count'"):
    run.evaluate(colours, evals)
  missing = {"zero_shot": {"count": 4}, "b": {"type": "retrieval", "data": "x"}}
  with pytest.raises(FileNotFoundError, match="does not exist") as error:
    run.evaluate(colours, missing)
  assert error.value.__notes__ == ["(in evaluation 'b')"]
  assert colours.batches == []


@pytest.mark.parametrize("key", ["every_step", "every_", "every_hours"])
def test_misspelt_schedules_raise(key):
  with pytest.raises(ValueError, match=f"no option '{key}'.*every_steps"):
    run.build(ConfigDict({"zero_shot": {key: 5, "count": 4}}))


def test_evaluators_are_built_once_and_keep_their_data(colours, monkeypatch):
  config = ConfigDict({"zero_shot": {"every_steps": 5, "count": 4}})
  built = run.build(config)
  first = run.evaluate(colours, built)
  monkeypatch.setattr(registry, "open_classification", None)
  second = run.evaluate(colours, built)
  assert first["zero_shot"].metrics == second["zero_shot"].metrics


def test_results_keep_units_and_pictures(colours):
  picture = np.zeros((2, 2, 3), np.uint8)

  class Metres(base.Evaluator):
    def run(self, encoder):
      units, sheets = {"rmse": "m"}, {"depth": picture}
      options = dict(units=units, lower=("rmse",), sheets=sheets)
      return Result({"rmse": 0.5}, {}, **options)

  got = run.evaluate(colours, {"depth": Metres()})["depth"]
  assert got.units == {"rmse": "m"} and got.lower == ("rmse",)
  assert got.sheets["depth"] is picture
  assert got.protocol["seconds"] >= 0


def test_table_has_chance_and_protocol():
  found = {
    "a": Result({"x": 0.5}, {"templates": list("abcdefghij")}, {"x": 0.25}),
    "b": Result({"y": 1.0}, {}),
  }
  outcome = results.Outcome("value", "", "", found)
  lines = tables.format_results([outcome]).splitlines()
  assert lines[2].split() == ["a", "x", "%", "50.00", "25.00"]
  assert lines[3].split() == ["b", "y", "%", "100.00"]
  assert "  templates: 10: 'a', 'b', ... 'j'" in lines


@pytest.mark.reference
def test_make_prompts(tmp_path, capsys):
  pytest.importorskip("open_clip")
  path = tmp_path / "imagenet.json"
  run_command("make_prompts", [f"--output={path}"])
  assert "1000 classes, 80 templates" in capsys.readouterr().out
  assert len(json.loads(path.read_text())["ids"]) == 1000


def test_every_evaluation_can_run_in_training():
  for name in base.EVALUATORS:
    options = base.default_options(name)
    assert options["data"] == "scenes", name
    # Without sheets; training sets the number of its own.
    assert options.get("pictures", 0) == 0, name
    entry = ConfigDict({"type": name, "every_steps": 5, "data": "scenes"})
    run.build({"mine": entry})


def test_every_evaluation_is_in_the_docs(repo_root):
  page = (repo_root / "docs" / "evaluation.md").read_text(encoding="utf-8")
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in page.splitlines()
    if line.startswith("| `")
  ]
  told = {row[0].strip("`"): row for row in rows if len(row) == 4}
  assert list(told) == list(base.EVALUATORS)
  for name, row in told.items():
    known = base.default_options(name)
    for option in row[3].split(", "):
      assert option.strip("`") in known, f"{name} has no option {option}"
  named = re.findall(r"--set=([a-z]\w*)\.(\w+)", page)
  assert named
  for name, option in named:
    assert option in base.default_options(name), f"{name}.{option}"
