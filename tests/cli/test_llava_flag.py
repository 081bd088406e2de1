"""`mtv-jax evaluate --llava`: stages are trained in order, then evaluated."""

import pytest

from mtv_jax.cli import evaluate
from mtv_jax.evals.encoder_requests import Request
from mtv_jax.utils.errors import ConfigError


def test_stages_are_trained_in_order(monkeypatch, tmp_path):
  commands = []

  def run_command(name, flags):
    commands.append((name, *flags))
    return 3 if "bad" in flags[1] else 0

  monkeypatch.setattr(evaluate, "run_command", run_command)
  monkeypatch.setattr(evaluate.loading, "default_weights", lambda path: path)
  request = Request("runs/a", "ema", "x/a")
  options = dict(encoder=["runs/a"], evals="vqa", output=str(tmp_path))
  args = evaluate.Flags(**options, llava=["stage=1,data=b", "stage=2"])
  folders = [f"{tmp_path}/llava/x-a/{i}" for i in (1, 2)]
  want = Request(folders[1], folders[1], "x/a")
  assert evaluate.train_language_model(request, args) == want
  configs = ["encoder=runs/a,stage=1,data=b", f"encoder={folders[0]},stage=2"]
  assert commands == [
    ("train", f"--workdir={folder}", f"--config=llava:{config}")
    for folder, config in zip(folders, configs, strict=True)
  ]
  args = evaluate.Flags(**options, llava=["bad"])
  with pytest.raises(SystemExit):
    evaluate.train_language_model(request, args)
  args = evaluate.Flags(**options | {"evals": "all"}, llava=["stage=1"])
  with pytest.raises(ConfigError, match="--evals=vqa alone"):
    evaluate.train_language_model(request, args)
