"""Benchmark of experts, with tiny models."""

import json

import numpy as np
import pytest

from mtv_jax.perf.bench import depth_anything, experts


@pytest.mark.reference
def test_speed_and_difference_of_two_sides(monkeypatch):
  pytest.importorskip("transformers")

  class Model:
    @staticmethod
    def ours(variant, folder, batch_size):
      del folder
      return lambda: np.full((batch_size, 2), 1.0)

  def write(variant, folder):
    assert folder.is_dir() and variant == "S"
    return "model"

  def run(model, batch_size):
    assert model == "model"
    return lambda: np.full((batch_size, 2), 1.25)

  oracle = experts.harness.import_oracle("transformers_experts")
  monkeypatch.setitem(oracle.WRITE, "depth", write)
  monkeypatch.setitem(oracle.RUN, "depth", run)
  monkeypatch.setattr(experts.harness, "import_oracle", lambda name: oracle)
  monkeypatch.setattr(experts, "_import_model", lambda kind: Model)
  monkeypatch.setattr(experts.jax, "local_device_count", lambda: 1)
  result = experts.run("depth", batch_size=3, rounds=2)
  assert result["difference"] == pytest.approx(0.2)
  assert result["batch_size"] == 3 and len(result["speeds"]) == 2
  assert "our speed over theirs" in str(result)
  assert json.loads(result.to_json())["variant"] == "S"


@pytest.mark.slow
def test_runs_without_transformers(monkeypatch):
  monkeypatch.setattr(depth_anything, "SIZE", 28)
  result = experts.run("depth", variant="mu", rounds=1, against="none")
  assert result["theirs"] is None and result["ours"] > 0
  assert "transformers" not in str(result)


def test_unknown_expert_raises():
  with pytest.raises(ValueError, match="depth"):
    experts.run("dept")


@pytest.mark.reference
def test_compiles_for_a_tpu(monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.setattr(depth_anything, "SIZE", 56)
  result = experts.compile_expert(
    "depth", variant="mu", batch_size=2, topology="v5e:2x2"
  )
  assert result["flops"] > 1e6
  used = result["arguments"] + result["temporaries"]
  assert 0 < used < result["memory"]
  assert "FLOPs per image" in str(result)
  json.loads(result.to_json())
