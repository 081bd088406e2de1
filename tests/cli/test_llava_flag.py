"""`mtv-jax evaluate --llava`: stages are trained in order, then evaluated."""

import pathlib

import pytest

from mtv_jax.cli import evaluate
from mtv_jax.config import recipes
from mtv_jax.evals.encoder_requests import Request
from mtv_jax.utils.errors import ConfigError

ENCODER = "random:mu/8@32"


def test_stages_are_trained_in_order(monkeypatch, tmp_path):
  commands = []

  def run_command(name, flags):
    commands.append((name, *(flag.partition("=")[2] for flag in flags)))
    return 3 if "bad" in flags[1] else 0

  monkeypatch.setattr(evaluate, "run_command", run_command)
  request = Request(ENCODER, "ema", "x/a")
  options = dict(encoder=[ENCODER], evals="vqa", output=str(tmp_path))
  args = evaluate.Flags(**options, llava=["stage=1,tiny", "stage=2,tiny"])
  last = evaluate.train_language_model(request, args)
  names, (first, second), configs = zip(*commands, strict=True)
  assert last == Request(second, "student", "x/a")
  assert names == ("train", "train")
  assert pathlib.Path(first).parent == tmp_path / "llava" / "x-a"
  assert configs == (
    f"llava:stage=1,tiny,encoder={ENCODER},weights=ema",
    f"llava:stage=2,tiny,encoder={first},weights=student",
  )
  init = recipes.read_config(configs[0]).init
  assert (init.path, init.weights, init.grow_heads) == (ENCODER, "ema", True)

  def folder(step, weights="ema"):
    described = {"step": step}
    monkeypatch.setattr(
      evaluate.store, "describe_weights", lambda path: described
    )
    args = evaluate.Flags(**options, llava=["stage=1"])
    changed = request._replace(weights=weights)
    return evaluate.train_language_model(changed, args).path

  # Neither a later checkpoint nor other weights find the earlier run.
  assert folder(1) == folder(1)
  assert len({folder(1), folder(2), folder(1, "teacher")}) == 3

  args = evaluate.Flags(**options, llava=["bad"])
  with pytest.raises(SystemExit):
    evaluate.train_language_model(request, args)
  args = evaluate.Flags(**options | {"evals": "all"}, llava=["stage=1"])
  with pytest.raises(ConfigError, match="for --evals=vqa, in the folder"):
    evaluate.train_language_model(request, args)
