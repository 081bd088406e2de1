"""Required traffic between chips, and the remaining traffic of programs."""

import json
from collections import Counter

import jax
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.config import overrides, recipes
from mtv_jax.perf import hlo, topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.perf.preflight import scaling

ROWS, CHIPS = 4, 8


def make_plan(repo_root, *changes, name="mtv_b16_224"):
  config = recipes.read_config(str(repo_root / f"configs/{name}.py:tiny"))
  changes = (f"batch_size={ROWS * CHIPS}", *changes)
  return compile_lib.make_plan(
    overrides.override(config, changes), topologies.parse(f"cpu:{CHIPS}")
  )


def row(kind, shape, *, count=1.0, size=100.0, scope="", group=CHIPS):
  return hlo.Collective(kind, "a", shape, 0, group, count, size, scope)


def step_row(plan, collectives):
  memory = compile_lib.Memory(0, 0, 0, 1, None)
  return scaling.make_step_row(
    plan, compile_lib.CompileResult(memory, collectives=tuple(collectives))
  )


def test_gradients_are_reduced_once_per_encoding(repo_root):
  plan = make_plan(repo_root, "objectives.dino.prototypes=66")
  sizes = scaling.count_gradient_sizes(plan)
  params = plan.train_step.abstract.params
  fc1 = params["text"]["blocks"]["mlp"]["fc1"]["kernel"]
  depth, elements = fc1.shape[0], fc1.size // fc1.shape[0]
  # Encodings: image, global and local crops; captions and phrases.
  assert params["image"]["blocks"]["mlp"]["fc1"]["kernel"].shape == fc1.shape
  fc2 = 1  # It has an equal number of elements.
  assert sizes[elements] >= (1 + fc2) * 5 * depth
  assert sizes[params["text"]["token_embedding"].size] == 2
  changes = "objectives.dino.prototypes=66", "objectives.dino.chunk=11"
  chunked = make_plan(repo_root, *changes)
  matrix = params["heads"]["dino"]["last_layer"]["kernel"]
  assert sizes[matrix.size] == 1
  actual = scaling.count_gradient_sizes(chunked)
  assert (actual[matrix.size], actual[matrix.size // 6]) == (0, 6)


def test_a_caption_decoder_is_reduced_once_per_call_and_chunk(repo_root):
  config = recipes.read_config("mtv_tiny:tiny")
  config.objectives = dict(captioning=dict(bins=42, chunk=125))
  config.evals = {}
  plan = compile_lib.make_plan(config, topologies.parse(f"cpu:{CHIPS}"))
  decoder = plan.train_step.abstract.params["heads"]["caption_decoder"]
  width, columns = decoder["projection"]["kernel"].shape
  assert columns == 258 + 42
  sizes = scaling.count_gradient_sizes(plan)
  # 300 columns in three chunks, for captions and for regions.
  assert sizes[width * 125] == 2 * 3
  assert sizes[decoder["position_embedding"].size] == 2


def test_frozen_parameters_have_no_reduction(repo_root):
  plan = make_plan(repo_root, name="siglip_lit_b16_224")
  params = plan.train_step.abstract.params
  trained = jax.tree.leaves((params["text"], params["heads"]))
  sizes = scaling.count_gradient_sizes(plan)
  reduced = sum(size * times for size, times in sizes.items())
  assert reduced == sum(leaf.size for leaf in trained)


def test_reductions_beyond_the_gradients_are_not_matched():
  back = "jit(f)/transpose(jvp(x))/dot"
  rows = [
    row("all-reduce", "bf16[1,4,8]", count=3.0, size=300.0, scope=back),
    # Several arrays fused; no parameter has 36 elements.
    row("all-reduce", "f32[8], f32[2,18], f32[32]", size=76.0, scope="jvp(y)"),
    row("all-gather", "f32[4,8]", scope=back),
    row("collective-permute", "f32[4,8]", scope=back),
  ]
  actual = scaling.find_gradient_reductions(rows, Counter({32: 3, 8: 1}))
  assert [r.bytes for r in actual] == [300.0, 8.0]
  # With one more gradient of 32 elements the last operand matches too.
  actual = scaling.find_gradient_reductions(rows, Counter({32: 4, 8: 1}))
  assert [r.bytes for r in actual] == [300.0, 40.0]


def test_collectives_without_gradients_are_the_rest(repo_root):
  extra = row("collective-permute", "f32[999]", size=12345.0)
  result = step_row(make_plan(repo_root), [extra])
  assert (result["gradients"], result["rest"]) == (0.0, 12345.0)


def test_growth_is_in_the_table_and_in_json(tmp_path, monkeypatch):
  first = dict(
    chips=16, peak=1000, received=50.0, gradients=20.0, rest=20.0,
    seconds=1.0,
  )  # fmt: skip
  more = dict(first, chips=256, peak=1010, received=51.0, rest=21.0)
  result = scaling.compute_growth([first, more])
  assert result["peak"] == [pytest.approx(1.0)]
  assert result["rest"] == [pytest.approx(5.0)]
  text = scaling.format_table([first, more])
  assert "growth from 16 chips to 256" in text and "+5.0 %" in text
  monkeypatch.setattr(scaling, "TOPOLOGIES", ())
  monkeypatch.setattr(topologies, "use_cpu", lambda topology: None)
  path = tmp_path / "rows.json"
  assert run_command("preflight", ["--scaling=loss", f"--json={path}"]) == 0
  assert json.loads(path.read_text()) == {"rows": []}
  assert scaling.to_dict([first, more])["rows"][1]["rest"] == 21.0


@pytest.mark.slow
def test_the_rest_of_a_recipes_traffic_is_small(repo_root):
  """Compiled for eight devices."""
  plan = make_plan(repo_root)
  compiled = plan.lower().compile()
  result = step_row(plan, hlo.list_collectives(compiled))
  params = plan.train_step.abstract.params
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert result["gradients"] > 2 * 7 / 8 * size
  # A loss over the global batch receives the others' columns, a ring also
  # returns their gradients. KoLeo's one group gathers all images.
  width, regions = plan.spec.model.embed_dim, 4 * ROWS
  contrast = 7 * ROWS * (4 * width + 5) + 8 * ROWS * 4 * width
  grounding = 7 * regions * (4 * width + 9) + 8 * regions * 4 * width
  koleo = 2 * 7 * ROWS * 4 * width
  rest = result["rest"] - contrast - grounding - koleo
  assert 0 <= rest < 0.05 * result["received"], result
