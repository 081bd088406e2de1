"""The PyTorch step's loss equals ours."""

import pytest

from mtv_jax.perf.bench import against_torch

pytestmark = [pytest.mark.slow, pytest.mark.reference]


@pytest.mark.parametrize(
  ("what", "small"),
  [
    ("siglip", dict(image_size=64)),
    ("distillation", dict(image_size=64, local=32, prototypes=256)),
  ],
)
def test_first_losses_are_equal(what, small):
  pytest.importorskip("open_clip")
  result = against_torch.compare(
    what, batch_size=4, rounds=1, threads=1, depth=2, **small
  )
  ours, theirs = result["losses"]
  assert ours == pytest.approx(theirs, rel=1e-5)
  trained = result["parameters"]
  assert trained[0] == trained[1]
  assert result["speed"] == pytest.approx(result["torch"] / result["ours"])
  assert "our speed over PyTorch's" in str(result)


def test_unknown_comparison_raises():
  with pytest.raises(ValueError, match="Did you mean 'siglip'"):
    against_torch.compare("siglib", batch_size=1, rounds=1, threads=1)
