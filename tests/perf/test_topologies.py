"""Names of machines that need not be there."""

import pytest

from mtv_jax.perf import topologies


@pytest.mark.parametrize(
  ("name", "kind", "chips", "hosts", "slices"),
  [
    ("v5e:16x16", "v5e", 256, 64, 1),
    ("v5e-256", "v5e", 256, 64, 1),
    ("v5litepod-16", "v5e", 16, 4, 1),
    ("v5e:2x4", "v5e", 8, 1, 1),
    ("v5e:1x1", "v5e", 1, 1, 1),
    ("v4:4x4x8", "v4", 128, 32, 1),
    ("v5p:8x8x8", "v5p", 512, 128, 1),
    ("2xv6e:4x4", "v6e", 32, 8, 2),
    ("cpu:8", "cpu", 8, 1, 1),
    ("gpu:16xH100", "H100", 16, 2, 1),
    ("gpu:8x80GB", "80GB", 8, 1, 1),
  ],
)
def test_names(name, kind, chips, hosts, slices):
  found = topologies.parse(name)
  assert (found.chip.kind, found.chips) == (kind, chips)
  assert (found.hosts, found.slices) == (hosts, slices)
  assert topologies.chip(name) is found.chip or not found.is_tpu


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e:3x3", "hosts of 2x2x1 chips do not divide it"),
    ("v5e:2x2x2", "torus of 2 dimensions"),
    ("v5e:16x32", "at most 256 chips .16x16.; more .* 2xv5e:16x16"),
    ("v5:2x2", "Did you mean 'v5p'"),
    ("v4-32", "give the shape"),
    ("v5e:0x4", "no number of chips"),
    ("gpu:8xH10", "Did you mean 'H100'"),
    ("2xcpu:8", "only TPUs come in slices"),
    ("a pod", "no topology is called"),
  ],
)
def test_names_of_nothing(name, message):
  with pytest.raises(ValueError, match=message):
    topologies.parse(name)


def test_chips_know_memory_and_peak():
  chip = topologies.chip("v5e:4x4")
  assert chip.hbm_bytes == 15.75 * 2**30
  assert chip.peak_bf16_flops == 197e12


def test_a_missing_compiler_is_said(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"mtv_jax\[preflight\]"):
    topologies.devices("v5e:2x2")


@pytest.mark.reference
@pytest.mark.parametrize(
  "name", ["v5e:16x16", "v5e:2x4", "v4:4x4x8", "v5p:4x4x8", "2xv6e:4x4"]
)
def test_the_compiler_has_as_many_chips_and_hosts(name):
  found, parsed = topologies.devices(name), topologies.parse(name)
  assert len(found) == parsed.chips
  assert len({device.process_index for device in found}) == parsed.hosts
