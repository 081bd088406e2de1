"""The recipe with every objective: sharded, without labels, without parts."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny_mtv
from step_samples import mesh_of

from mtv_jax.config import recipes
from mtv_jax.models.positions import Rope
from mtv_jax.parallel.mesh import replicated_sharding, shard_batch
from mtv_jax.perf import flops
from mtv_jax.train import gradients
from mtv_jax.train.config import resolve
from mtv_jax.train.forward import total_loss
from mtv_jax.train.run import build_spec, make_loader, open_run
from mtv_jax.train.spec import abstract_params, init_params, init_state
from mtv_jax.train.step import make_train_step
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names, map_with_names


@pytest.mark.slow
def test_dropping_an_objective_changes_no_other_initial_value():
  spec, key = tiny_mtv.everything(), jax.random.key(3)
  whole = dict(flatten_with_names(init_params(spec, key)))
  for dropped in ("contrastive", "ibot"):
    names = tuple(name for name in spec.objectives if name != dropped)
    rest = init_params(spec.select_objectives(names), key)
    assert set(rest["heads"]) == set(spec.select_objectives(names).heads)
    for name, leaf in flatten_with_names(rest):
      np.testing.assert_array_equal(leaf, whole[name], err_msg=name)


@functools.cache
def weights():
  """Parameters, and the anchor's, which differ.

  Sampled in NumPy, as compiling the initialisers takes longest.
  """
  rng = np.random.default_rng(1)

  def draw(name, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if name.endswith("kernel"):
      shape = leaf.shape[1:] if "blocks" in name else leaf.shape
      return noise / np.sqrt(np.prod(shape[:-1]))
    return np.float32(name.endswith("scale")) + 0.02 * noise

  shapes = abstract_params(tiny_mtv.everything())
  anchor = map_with_names(draw, {"image": shapes["image"]})
  return map_with_names(draw, shapes), {"anchor": anchor}


@functools.cache
def compiled(shape, names=None, accumulate=1, remat="none"):
  """(batch) -> losses by objective, and gradients by parameter."""
  whole = tiny_mtv.everything(accumulate, remat)
  spec = whole if names is None else whole.select_objectives(names)
  mesh = mesh_of(shape)
  # The state is the whole recipe's, even if only a part is computed.
  state = make_train_step(whole, optax.sgd(0.1), mesh).init(*weights())

  def compute(state, batch):
    (_, terms), grads = gradients.compute_gradients(spec, state, batch, mesh)
    return {name: term.loss.value() for name, term in terms.items()}, grads

  jitted = jax.jit(compute, out_shardings=replicated_sharding(mesh))

  def call(batch):
    losses, grads = jax.device_get(jitted(state, shard_batch(batch, mesh)))
    return losses, dict(flatten_with_names(grads))

  return call


@functools.cache
def one_device():
  return compiled((1, 1, 1))(tiny_mtv.rows())


def assert_near(actual, expected, tolerance, floor):
  losses, grads = actual
  assert losses.keys() == expected[0].keys()
  for name, loss in expected[0].items():
    assert losses[name] == pytest.approx(loss, rel=1e-5, abs=1e-6), name
  for name, grad in expected[1].items():
    scale = np.linalg.norm(grad)
    if name == "heads/depth/conv3/bias":
      # Depth is invariant to shifts: this is the rounding of a sum of zero,
      # whose terms are as large as the kernel's.
      scale = np.linalg.norm(expected[1]["heads/depth/conv3/kernel"])
    distance = np.linalg.norm(grads[name] - grad)
    assert distance <= tolerance * scale + floor, name


# Every choice for a stack of blocks is in tests/models/test_remat.py.
REMAT = (
  "full|image=qkv,mlp_hidden|local=attention_out|global=dots|text=mlp_hidden"
  "|box_phrase=none"
)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("shape", "accumulate", "remat"),
  [
    ((2, 2, 2), 2, REMAT),
    pytest.param((2, 1, 1), 4, "none", marks=pytest.mark.long),
    pytest.param((8, 1, 1), 1, "none", marks=pytest.mark.long),
    pytest.param((2, 4, 1), 1, "none", marks=pytest.mark.long),
  ],
  ids=str,
)
def test_the_step_is_the_same_over_devices_and_parts(shape, accumulate, remat):
  """Losses and gradients of every objective, with unevenly spread labels.

  Includes KoLeo, Sinkhorn and contrastive negatives. Dropped paths depend on
  the global row, rotary draws only on the view.
  """
  assert all(loss > 0 for loss in one_device()[0].values())
  step = compiled(shape, accumulate=accumulate, remat=remat)
  actual = step(tiny_mtv.rows())
  assert_near(actual, one_device(), 1e-5, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["drop_path", "rope"])
def test_augmentations_of_the_encoder_reach_the_losses(part):
  """The augmentations change the losses compared above."""
  spec = tiny_mtv.everything().select_objectives(("contrastive",))
  if part == "drop_path":
    spec = dataclasses.replace(spec, runtime={**spec.runtime, "drop_path": 0.0})
  else:
    image = dataclasses.replace(spec.model.image, rope=Rope())
    model = dataclasses.replace(spec.model, image=image)
    spec = dataclasses.replace(spec, model=model)
  state = init_state(tiny_mtv.everything(), optax.sgd(0.1), *weights())
  loss, _ = jax.jit(functools.partial(total_loss, spec))(
    state.params, state, tiny_mtv.rows()
  )
  assert abs(loss - one_device()[0]["contrastive"]) > 1e-4


@pytest.mark.slow
def test_objectives_without_labels_change_nothing_else():
  """One by one in the losses, all three in the gradients."""
  losses, batch = one_device()[0], dict(tiny_mtv.rows())
  for name, fields in tiny_mtv.LABELS.items():
    zeros = {field: np.zeros_like(batch[field]) for field in fields}
    without, _ = compiled((1, 1, 1))({**batch, **zeros})
    assert without.pop(name) == 0
    without.pop("captioning")  # Reads captions and boxes.
    for other, value in without.items():
      assert value == pytest.approx(losses[other], rel=1e-6), other
  for fields in tiny_mtv.LABELS.values():
    batch |= {field: np.zeros_like(batch[field]) for field in fields}
  losses, grads = compiled((1, 1, 1))(batch)
  labelled = (*tiny_mtv.LABELS, "captioning")
  assert [losses.pop(name) for name in labelled] == [0] * len(labelled)
  rest = tuple(n for n in tiny_mtv.everything().objectives if n in losses)
  expected = compiled((1, 1, 1), rest)(batch)
  assert_near((losses, grads), expected, 1e-6, 1e-9)


@pytest.mark.slow
def test_a_dropped_objective_has_no_parameters_and_fields(tmp_path):
  config = tiny_mtv.read()
  # Its labels must not even be opened.
  config.data.train[0]["labels"] = dict(depth=str(tmp_path / "nowhere"))
  config.data.train[0]["type"] = "scenes"
  for name in ("depth", "mae", "dino", "ibot"):
    del config.objectives[name]
  del config.evals["relative_depth"]
  run = open_run(config, tmp_path)
  names = run.train_step.abstract.params["heads"].keys()
  assert set(names) == {"contrastive", "grounding", "prompter"}
  assert not run.train_step.abstract.teacher
  assert "mask_token" not in run.train_step.abstract.params["image"]
  assert {str(e) for e in run.spec.plan} == {
    "image(image, student)",
    "text(caption, student)",
    "text(box_phrase, student)",
  }
  with make_loader(run, 0) as loader:
    batch = next(loader)
  assert "depth" not in batch and "boxes" in batch


def test_one_crop_for_all_objectives(tmp_path):
  config = recipes.read_config("mtv_b16_224:tiny,shared_crop")
  config.objectives.grounding.distinct_phrases = 0.5
  spec = open_run(config, tmp_path).spec
  assert sorted(map(str, spec.plan)) == [
    "image(global, student)",
    "image(global, teacher)",
    "image(local, student)",
    "text(box_phrase, student)",
    "text(caption, student)",
  ]
  assert "image" not in spec.views


def test_without_text_there_is_no_text_tower(tmp_path):
  config = tiny_mtv.read()
  for name in ("contrastive", "grounding"):
    del config.objectives[name]
  config.evals = {}
  run = open_run(config, tmp_path)
  assert run.config.model.text is None
  assert "text" not in run.train_step.abstract.params
  with make_loader(run, 0) as loader:
    assert set(next(loader)) == {"image", "image_size", "depth"}


def test_a_text_tower_that_no_objective_trains_is_frozen(tmp_path, caplog):
  config = recipes.read_config("captioning_scenes:tiny")
  run = open_run(config, tmp_path)
  assert "it is frozen, at random values" in caplog.text
  text = [row for row in run.optimizer.table if "text/" in row.name]
  assert len(text) > 9 and all(row.frozen for row in text)
  moments = flatten_with_names(run.train_step.abstract.opt_state)
  assert not [name for name, _ in moments if "/text/" in name]
  # The resolved config builds an equal run.
  again = open_run(run.config.to_dict(), tmp_path)
  assert again.config == run.config
  config.objectives.contrastive = dict(weight=1.0)
  both = open_run(config, tmp_path)
  assert not any(row.frozen for row in both.optimizer.table)


def test_teacher_momentum_schedule():
  spec = dataclasses.replace(
    tiny_mtv.built(), teacher_momentum=0.992, teacher_end=1.0, total_steps=101
  )
  actual = [float(spec.momentum(step)) for step in (0, 50, 100, 500)]
  np.testing.assert_allclose(actual, [0.992, 0.996, 1.0, 1.0], rtol=1e-6)
  fixed = dataclasses.replace(spec, teacher_end=None)
  assert float(fixed.momentum(77)) == pytest.approx(0.992)


@pytest.mark.parametrize(
  ("objective", "changes", "match"),
  [
    ("depth", dict(weight=dict(value=-1.0)), r"value is -1\.0, expected a num"),
    ("depth", dict(weight=dict(value="big")), "value is 'big', expected a num"),
    ("depth", dict(weight=dict(start_steps=1000)), "starts at step 1000 of a"),
    # The EMA teacher's head reads another width.
    ("ibot", dict(head="dino"), "both declare heads/dino"),
  ],
)
def test_invalid_objectives_are_rejected(objective, changes, match):
  config = tiny_mtv.read().to_dict()
  config["model"]["projection"] = config["model"]["text"]["projection"] = 16
  config["objectives"][objective].update(changes)
  with pytest.raises(ConfigError, match=match):
    _ = build_spec(resolve(config), total_steps=100).heads


def test_objectives_share_a_head_of_equal_options():
  config = tiny_mtv.read().to_dict()
  more = {**config["objectives"]["depth"], "type": "depth"}
  config["objectives"]["depth-2"] = more
  spec = build_spec(resolve(config), total_steps=100)
  assert "heads/depth" in spec.shared_modules
  more["taps"] = (0, 0, 0, 1)
  with pytest.raises(ConfigError, match="both declare heads/depth"):
    _ = build_spec(resolve(config), total_steps=100).heads


def abstract_rows():
  rows = tiny_mtv.rows().items()
  return {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in rows}


@pytest.mark.slow
def test_step_flops_are_the_sum_of_their_parts():
  """Each encoding once; and less of them is less."""
  built, batch = tiny_mtv.built(), abstract_rows()
  cost = flops.step_flops(built, batch, optax.sgd(0.1))
  assert cost.traced == pytest.approx(cost.total, rel=1e-4)
  assert {"image(image, student)", "heads of depth"} <= set(cost.parts)
  assert cost.share < 0.95
  rest = tuple(n for n in built.objectives if n != "depth")
  less = flops.step_flops(built.select_objectives(rest), batch, optax.sgd(0.1))
  # Only its head disappears: grounding also reads the encoding.
  assert cost.traced - less.traced == pytest.approx(
    cost.parts["heads of depth"] + cost.parts["loss of depth"], rel=1e-3
  )


@pytest.mark.slow
def test_prototypes_in_chunks_cost_more_flops_and_no_less():

  def traced(chunk):
    spec = tiny_mtv.built().select_objectives(("ibot",))
    ibot = dataclasses.replace(spec.objectives["ibot"], chunk=chunk)
    spec = dataclasses.replace(spec, objectives={"ibot": ibot})
    return flops.step_flops(spec, abstract_rows(), optax.sgd(0.1)).traced

  # The student's logits twice; the teacher's once more per iteration.
  assert traced(16) > traced(None)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "most", "compile"),
  # XLA takes minutes for L/16, whose program differs only in its sizes.
  [
    ("mtv_b16_224.py", 0.71, "no"),
    pytest.param(*("mtv_b16_224.py", 0.71, "whole"), marks=pytest.mark.long),
    pytest.param(*("mtv_l16_256.py", 0.69, "no"), marks=pytest.mark.long),
    pytest.param(
      *("mtv_b16_224.py:shared_crop", 0.6, "no"), marks=pytest.mark.long
    ),
  ],
)
def test_the_step_computes_each_encoding_once(name, most, compile):
  config = recipes.read_config(str(tiny_mtv.ROOT / "configs" / name))
  cost = flops.run(config, batch_size=16, compile=compile)
  print(f"\n{cost}")
  assert cost.share <= most
  if compile == "whole":
    assert cost.compiled == pytest.approx(cost.total, rel=0.03)
