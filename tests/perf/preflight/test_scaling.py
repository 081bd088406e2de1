"""What chips must send each other, and what they send beside it."""

import dataclasses
import json
from collections import Counter

import jax
import pytest

from mtv_jax.cli import preflight
from mtv_jax.config import overrides, schema
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf.preflight import exchanges, program, scaling

ROWS, CHIPS = 4, 8


def planned(repo_root, *changes, name="mtv_b16_224"):
  config = schema.read_config(str(repo_root / f"configs/{name}.py:tiny"))
  changes = (f"batch_size={ROWS * CHIPS}", *changes)
  return program.make_plan(
    overrides.override(config, changes), topologies.parse(f"cpu:{CHIPS}")
  )


def row(kind, shape, *, count=1.0, size=100.0, scope="", group=CHIPS):
  return hlo.Collective(kind, "a", shape, 0, group, count, size, scope)


def test_embeddings_are_reckoned_from_recipe_and_mesh(repo_root):
  plan = planned(repo_root)
  width = plan.recipe.model.embed_dim
  contrast = 7 * ROWS * (4 * width + 5) + 8 * ROWS * 4 * width
  regions = 4 * ROWS
  grounding = 7 * regions * (4 * width + 9) + 8 * regions * 4 * width
  koleo = 7 * ROWS * (4 * width + 1) + 8 * ROWS * 4 * width
  assert exchanges.embeddings(plan) == contrast + grounding + koleo
  gathered = planned(
    repo_root,
    "objectives.contrastive.method=gathered",
    "objectives.grounding.method=gathered",
    "objectives.distillation.koleo_weight=0",
  )
  expected = 2 * 7 * 5 * ROWS * 4 * width
  assert exchanges.embeddings(gathered) == expected


def test_gradients_are_reduced_once_an_encoding(repo_root):
  plan = planned(repo_root, "objectives.distillation.prototypes=66")
  sizes = exchanges.gradient_sizes(plan)
  params = plan.program.abstract.params
  fc1 = params["text"]["blocks"]["mlp"]["fc1"]["kernel"]
  depth, elements = fc1.shape[0], fc1.size // fc1.shape[0]
  # Image, global and local crops of one tower, captions and phrases of another.
  assert params["image"]["blocks"]["mlp"]["fc1"]["kernel"].shape == fc1.shape
  fc2 = 1  # Of the same number of elements.
  assert sizes[elements] >= (1 + fc2) * 5 * depth
  assert sizes[params["text"]["token_embedding"].size] == 2
  chunked = planned(
    repo_root,
    "objectives.distillation.prototypes=66",
    "objectives.distillation.chunk=11",
  )
  matrix = params["heads"]["dino"]["last_layer"]["kernel"]
  assert sizes[matrix.size] == 1
  found = exchanges.gradient_sizes(chunked)
  assert (found[matrix.size], found[matrix.size // 6]) == (0, 6)


def test_what_is_frozen_has_no_gradient_to_reduce(repo_root):
  plan = planned(repo_root, name="siglip_lit_b16_224")
  params = plan.program.abstract.params
  trained = jax.tree.leaves((params["text"], params["heads"]))
  sizes = exchanges.gradient_sizes(plan)
  reduced = sum(size * times for size, times in sizes.items())
  assert reduced == sum(leaf.size for leaf in trained)


def test_only_as_many_reductions_as_there_are_gradients_are_theirs():
  back = "jit(f)/transpose(jvp(x))/dot"
  rows = [
    row("all-reduce", "bf16[1,4,8]", count=3.0, size=300.0, scope=back),
    # Joined with others, under the name of one; 36 elements are no parameter's.
    row("all-reduce", "f32[8], f32[2,18], f32[32]", size=76.0, scope="jvp(y)"),
    row("all-gather", "f32[4,8]", scope=back),
    row("collective-permute", "f32[4,8]", scope=back),
  ]
  found = exchanges.gradients(rows, Counter({32: 3, 8: 1}))
  assert [r.bytes for r in found] == [300.0, 8.0]
  # With one more of them allowed for, the joined one is theirs too.
  found = exchanges.gradients(rows, Counter({32: 4, 8: 1}))
  assert [r.bytes for r in found] == [300.0, 40.0]


def test_what_is_sent_by_accident_stays_in_the_rest(repo_root):
  plan = planned(repo_root)
  extra = row("collective-permute", "f32[999]", size=12345.0)
  known = exchanges.embeddings(plan)
  kept = row("collective-permute", "f32[1]", size=float(known))
  made = scaling.step_row(plan, [kept], peak=1, seconds=0.0)
  assert (made.rest, made.steady) == (0.0, 0.0)
  made = scaling.step_row(plan, [kept, extra], peak=1, seconds=0.0)
  assert made.embeddings == known and made.rest == 12345.0
  reduced = row("all-reduce", "f32[999]", size=2 * 7 / 8 * 3996)
  made = scaling.step_row(plan, [kept, reduced], peak=1, seconds=0.0)
  assert made.steady == pytest.approx(2 * 3996)


def test_growth_is_said_in_the_table_and_in_json(tmp_path, monkeypatch):
  first = scaling.StepRow(16, 1000, 50.0, 20.0, 10, 20.0, 1.0)
  more = dataclasses.replace(first, chips=256, peak=1010, received=51.0)
  made = scaling.growth([first, more])
  assert made["peak"] == [pytest.approx(1.0)]
  assert made["rest"] == [pytest.approx(5.0)]
  assert made["steady"] == [0.0]
  text = scaling.table([first, more])
  assert "growth from 16 chips to 256" in text and "+5.0 %" in text
  monkeypatch.setattr(scaling, "losses", list)
  monkeypatch.setattr(preflight.topologies, "use_cpu", lambda: None)
  preflight.scaling_of_losses(tmp_path / "rows.json")
  assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": []}
  assert scaling.to_dict([first, more])["rows"][1]["rest"] == 21.0


@pytest.mark.slow
def test_little_is_sent_beside_gradients_and_embeddings(repo_root):
  """Of a whole recipe, compiled for eight devices."""
  plan = planned(repo_root)
  compiled = plan.lower().compile()
  made = scaling.step_row(plan, hlo.collectives(compiled), peak=1, seconds=0.0)
  params = plan.program.abstract.params
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert made.gradients > 2 * 7 / 8 * size
  assert 0 <= made.rest < 0.05 * made.received, made
