"""Topology names and the devices that they stand for."""

import pytest

from mtv_jax.parallel.mesh import make_mesh
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
def test_parse(name, kind, chips, hosts, slices):
  parsed = topologies.parse(name)
  assert (parsed.chip.kind, parsed.chips) == (kind, chips)
  assert (parsed.hosts, parsed.slices) == (hosts, slices)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e:3x3", "hosts of 2x2x1 chips do not divide the slice"),
    ("v5e:2x2x2", "torus of 2 dimensions"),
    ("v5e:16x32", "at most 256 chips .16x16.; for more, .* 2xv5e:16x16"),
    ("v5:2x2", "Did you mean 'v5p'"),
    ("v4-32", "pass the shape"),
    ("v5e:0x4", "not a number of chips"),
    ("gpu:8xH10", "Did you mean 'H100'"),
    ("2xcpu:8", "only TPUs come in slices"),
    ("a pod", "'a pod': expected KIND:SHAPE"),
  ],
)
def test_invalid_names_raise(name, message):
  with pytest.raises(ValueError, match=message):
    topologies.parse(name)


def test_chip_memory_and_peak_flops():
  chip = topologies.parse("v5e:4x4").chip
  assert chip.hbm_bytes == 15.75 * 2**30
  assert chip.peak_bf16_flops == 197e12


def test_missing_libtpu_raises(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"mtv_jax\[preflight\]"):
    topologies.get_devices(topologies.parse("v5e:2x2"))


@pytest.mark.reference
@pytest.mark.parametrize(
  "name", ["v5e:16x16", "v5e:2x4", "v4:4x4x8", "v5p:4x4x8", "2xv6e:4x4"]
)
def test_libtpu_has_as_many_chips_and_hosts(name):
  parsed = topologies.parse(name)
  devices = topologies.get_devices(parsed)
  assert len(devices) == parsed.chips
  assert len({device.process_index for device in devices}) == parsed.hosts
  assert topologies.name_devices(devices) == parsed.canonical_name == name


@pytest.mark.reference
def test_coordinates_of_a_slice_may_start_anywhere():
  devices = topologies.get_devices(topologies.parse("v5e:4x4"))
  corner = [device for device in devices if min(device.coords[:2]) >= 2]
  assert topologies.name_devices(corner) == "v5e:2x2"


@pytest.mark.reference
@pytest.mark.parametrize("name", ["v5e:16x16", "v6e:16x16", "v5p:4x4x8"])
@pytest.mark.parametrize("fsdp", [1, 2, 8, 32])
def test_a_mesh_may_split_an_axis_of_the_network(name, fsdp):
  devices = topologies.get_devices(topologies.parse(name))
  mesh = make_mesh(dict(data=-1, fsdp=fsdp), devices)
  assert mesh.shape["fsdp"] == fsdp
  assert set(mesh.devices.flat) == set(devices)
