"""Search for the least recomputation that fits a chip."""

import json

import pytest

from mtv_jax.cli import train
from mtv_jax.config import recipes
from mtv_jax.models.remat import Remat
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.perf.preflight import report
from mtv_jax.perf.preflight import search as search_lib
from mtv_jax.train.config import resolve
from mtv_jax.train.run import build_spec
from mtv_jax.utils.errors import ConfigError

MIB = 2**20
SAVINGS = [
  search_lib.Saving(view, name, size * MIB, size * ratio)
  for view, name, size, ratio in (
    ("local", "mlp_hidden", 400, 8.0), ("image", "mlp_hidden", 300, 8.0),
    ("local", "qkv", 200, 8.0), ("image", "qkv", 150, 8.0),
    ("image", "attention_out", 50, 8.0), ("image", "attention", 50, 2.0),
  )  # fmt: skip
]  # fmt: skip


@pytest.fixture
def tiny(repo_root):
  path = repo_root / "configs/siglip_b16_224.py"
  return recipes.read_config(f"{path}:tiny")


@pytest.mark.slow
def test_savings_follow_from_the_shapes(tiny):
  """On one chip's rows: bytes of each array, and FLOPs of its product."""
  tiny.accumulate = 2
  tiny.model.remat = "full"
  plan = compile_lib.make_plan(tiny, topologies.parse("cpu:8"))
  savings = {(s.view, s.name): s for s in search_lib.list_savings(plan)}
  spec = ModelSpec.from_config(tiny.model)
  rows = tiny.batch_size // 8 // 2
  for view, tower, count in (
    ("image", spec.image, spec.image.grid**2),
    ("caption", spec.text, spec.text.length),
  ):
    tokens = rows * count * tower.depth
    for name, channels, product in (
      ("qkv", 3 * tower.width, 3 * tower.width**2),
      ("attention", tower.width, count * tower.width),
      ("attention_out", tower.width, tower.width**2),
      ("mlp_hidden", tower.mlp_dim, tower.width * tower.mlp_dim),
    ):
      saving = savings.pop((view, name))
      assert saving.bytes == 4 * tokens * channels
      assert saving.flops == 2 * tokens * product
  assert not savings  # Without layer scale nothing reads `mlp_out`.


def test_encodings_of_one_view_are_saved_together():
  """As with two objectives that encode a text field differently."""
  twice = search_lib.merge_savings([*SAVINGS, SAVINGS[2]])
  choice = search_lib.format_choice(twice, twice)
  assert choice == search_lib.format_choice(SAVINGS, SAVINGS)
  assert Remat.parse(choice).choose("image", "local") == "qkv,mlp_hidden"
  sizes = [saving.bytes // MIB for saving in twice]
  assert sizes == [400, 300, 400, 150, 50, 50]
  assert [MIB * s.flops / s.bytes for s in twice] == [8, 8, 8, 8, 8, 2]


def test_a_budget_above_the_memory_is_an_error(tiny):
  tiny.model.remat = "auto"
  topology = topologies.parse("v5e:2x2")
  with pytest.raises(ConfigError, match="16.00 GiB, more than the 15.75 GiB"):
    report.preflight(tiny, topology, budget=16 * 2**30)


def search(budget, padding=1.25, free=0):
  """Trials on a chip on which saved arrays take `padding` times their size."""

  def measure_peak(choice):
    saved = sum(s.bytes for s in SAVINGS if is_saved(s, choice))
    return 1000 * MIB + max(int(padding * saved) - free * MIB, 0)

  return list(search_lib.search_remat(SAVINGS, measure_peak, budget * MIB))


def is_saved(saving, choice):
  """Whether the encoding saves it, of the tower 'image'."""
  chosen = Remat.parse(choice).choose("image", saving.view)
  return saving.name in chosen.split(",")


@pytest.mark.parametrize("capacity", range(0, 1200, 100))
def test_what_is_written_is_what_was_chosen(capacity):
  """Also of a view that is named as its tower."""
  chosen = search_lib.choose_savings(SAVINGS, capacity * MIB)
  choice = search_lib.format_choice(chosen, SAVINGS)
  assert [s for s in SAVINGS if is_saved(s, choice)] == [
    s for s in SAVINGS if s in chosen
  ]


@pytest.mark.parametrize("padding, free", [(1.0, 0), (1.4, 0), (1.2, 300)])
@pytest.mark.parametrize("budget", [1100, 1300, 1700, 2100])
def test_the_search_ends_next_to_the_budget(budget, padding, free):
  trials = search(budget, padding, free)
  assert trials == search(budget, padding, free)
  assert trials[0].remat == "full" and len(trials) <= search_lib.COMPILATIONS
  best = max((t for t in trials if t.fits), key=lambda t: t.flops)
  assert best.peak <= budget * MIB
  # The savings within the budget, by this rule.
  capacity = ((budget - 1000 + free) * MIB) / padding
  most = sum(s.flops for s in search_lib.choose_savings(SAVINGS, capacity))
  assert best.flops >= 0.85 * most


def test_everything_or_nothing_fits():
  image = "qkv,attention,attention_out,mlp_hidden"
  everything = f"full|image={image}|local=qkv,mlp_hidden"
  assert [t.remat for t in search(4000)] == ["full", everything]
  (trial,) = search(900)
  assert not trial.fits and trial.remat == "full"


def test_a_capacity_takes_the_best_first_and_smaller_ones_after_it():
  chosen = search_lib.choose_savings(SAVINGS, 520 * MIB)
  names = [(s.view, s.name) for s in chosen]
  assert names == [("local", "mlp_hidden"), ("image", "attention_out")] + [
    ("image", "attention")
  ]


def test_auto_of_a_run(tiny, tmp_path, caplog):
  """'none' on CPUs; a resumed run uses its recorded choice."""
  caplog.set_level("INFO")
  tiny.model.remat = " auto "

  def choose():
    return train.choose_remat(resolve(tiny), str(tmp_path)).model.remat

  assert choose() == "auto:none"
  assert "remat='auto' is 'none'." in caplog.text
  # Runs before the prefix recorded only the choice.
  for prefix in ("", "auto:"):
    model = dict(remat=f"{prefix}full|image=qkv")
    recorded = json.dumps(dict(objectives={}, model=model))
    (tmp_path / "config.json").write_text(recorded)
    assert choose() == "auto:full|image=qkv"
    assert "'full|image=qkv', as in the run's config.json." in caplog.text
  tiny.model.remat = choose()
  remat_spec = build_spec(resolve(tiny), 9).remat
  assert remat_spec == Remat.parse("full|image=qkv")
  tiny.model.remat = "dots"
  assert choose() == "dots"


def test_auto_without_a_compiler_is_an_error_that_says_what_to_do(tiny):
  tiny.model.remat = "auto"
  topology = topologies.parse("cpu:1")
  with pytest.raises(ConfigError, match=r"memory of cpu .*--budget"):
    report.preflight(tiny, topology)
  tiny.model.remat = "auto "
  with pytest.raises(ValueError, match="is 'auto': set the choice that"):
    compile_lib.make_plan(tiny, topology)


@pytest.mark.parametrize("norms", [None, 1500, 3000])
def test_the_gradient_norms_fit_too_where_the_run_may_measure_them(
  norms, tiny, monkeypatch
):
  """The peak of the larger program, in MiB, without the saved arrays."""

  class Plan(compile_lib.CompilePlan):
    may_measure_norms = norms is not None

    def __init__(self, choice):
      saved = sum(s.bytes for s in SAVINGS if is_saved(s, choice))
      object.__setattr__(self, "saved", saved)

  def make_plan(config, topology, changes, **options):
    return Plan(changes[0].removeprefix("model.remat="))

  def make_compile(base):
    def compile_program(plan, **options):
      peak = base * MIB + plan.saved
      return compile_lib.CompileResult(compile_lib.Memory(0, 0, 0, peak, None))

    return compile_program

  monkeypatch.setattr(search_lib, "list_savings", lambda plan: SAVINGS)
  monkeypatch.setattr(compile_lib, "make_plan", make_plan)
  monkeypatch.setattr(compile_lib, "compile_step", make_compile(1000))
  monkeypatch.setattr(compile_lib, "compile_norms", make_compile(norms))
  topology = topologies.parse("gpu:8xH100")
  if norms == 3000:
    with pytest.raises(ConfigError, match="program of gradient norms does not"):
      search_lib.find_remat(tiny, topology, budget=2000 * MIB)
    return
  choice = search_lib.find_remat(tiny, topology, budget=2000 * MIB)
  capacity = (2000 - (norms or 1000)) * MIB
  best = max((t for t in choice.trials if t.fits), key=lambda t: t.flops)
  chosen = search_lib.choose_savings(SAVINGS, capacity)
  assert best.saved == sum(saving.bytes for saving in chosen)
  assert best.peak == (norms or 1000) * MIB + best.saved
  assert choice.plan.saved == best.saved
  assert (choice.norms is None) == (norms is None)


def test_a_run_may_measure_norms_at_spikes(tiny):
  topology = topologies.parse("cpu:1")
  plan = compile_lib.make_plan(tiny, topology)
  assert plan.may_measure_norms and not plan.measures_norms
  tiny.log.spikes = 0
  assert not compile_lib.make_plan(tiny, topology).may_measure_norms


@pytest.mark.slow
def test_auto_within_a_budget(tiny):
  """The compiler's memory on a CPU: full < auto <= budget < everything."""
  topology, peaks = topologies.parse("cpu:1"), []
  tiny.log.spikes = 0
  tiny.views = dict(image=dict(count=1, ops="resize(64)"))
  tiny.model.update(image_size=64, width=128, mlp_dim=512, heads=2)
  for choice in ("full", "qkv,attention,attention_out,mlp_hidden"):
    tiny.model.remat = choice
    plan = compile_lib.make_plan(tiny, topology)
    peaks.append(compile_lib.compile_step(plan).memory.peak)
  tiny.model.remat = "auto"
  budget = sum(peaks) // 2
  result = report.preflight(tiny, topology, budget=budget)
  assert peaks[0] < result.compiled.memory.peak <= budget
  assert result.compiled.largest
  choice = result.plan.config.model.remat
  assert f"--config.model.remat='{choice}'" in str(result)
