"""The benchmark of experts, at a size that takes no time."""

import json

import numpy as np
import pytest

from mtv_jax.perf.bench import depth_anything, experts


@pytest.mark.reference
def test_two_sides_are_compared(monkeypatch):
  """The difference and the ratios are those of what the sides do."""

  class Subject:
    @staticmethod
    def write(variant, folder):
      assert folder.is_dir() and variant == "S"
      return "model"

    @staticmethod
    def ours(variant, folder, batch_size):
      del folder
      return lambda: np.full((batch_size, 2), 1.0)

    @staticmethod
    def theirs(model, batch_size):
      assert model == "model"
      return lambda: np.full((batch_size, 2), 1.25)

  monkeypatch.setattr(experts, "_subject", lambda kind: Subject)
  monkeypatch.setattr(experts.jax, "local_device_count", lambda: 1)
  speed = experts.bench_expert("depth", batch_size=3, rounds=2)
  assert speed.difference == pytest.approx(0.2)
  assert speed.batch_size == 3 and len(speed.speeds) == 2
  assert "our speed over theirs" in str(speed)
  assert json.loads(speed.to_json())["variant"] == "S"


@pytest.mark.slow
def test_our_side_runs_alone(monkeypatch):
  monkeypatch.setattr(depth_anything, "SIZE", 28)
  speed = experts.bench_expert("depth", variant="mu", rounds=1, against="none")
  assert speed.theirs is None and speed.ours > 0
  assert "transformers" not in str(speed)


def test_an_unknown_expert_is_refused():
  with pytest.raises(ValueError, match="depth"):
    experts.bench_expert("dept")


@pytest.mark.reference
def test_a_program_for_a_tpu_is_counted(monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.setattr(depth_anything, "SIZE", 56)
  found = experts.compile_expert("depth", variant="mu", batch_size=2)
  assert found.flops > 1e6
  assert 0 < found.arguments + found.temporaries < found.memory
  assert "GFLOP an image" in str(found)
  json.loads(found.to_json())
