"""PyTorch's side of the comparison does what ours does."""

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
def test_the_first_losses_are_equal(what, small):
  pytest.importorskip("open_clip")
  found = against_torch.bench_against(
    what, batch_size=4, rounds=1, threads=1, depth=2, **small
  )
  ours, theirs = found.losses
  assert ours == pytest.approx(theirs, rel=1e-5)
  assert found.parameters[0] == found.parameters[1]
  assert found.speed == pytest.approx(found.torch / found.ours)
  assert "our speed over PyTorch's" in str(found)


def test_an_unknown_comparison_is_refused():
  with pytest.raises(ValueError, match="Did you mean 'siglip'"):
    against_torch.bench_against("siglib")
