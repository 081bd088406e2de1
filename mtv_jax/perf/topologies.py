"""Device topologies to compile for, and their chips.

`libtpu` compiles for TPUs on any machine and reports out-of-memory errors. Only
this module uses `jax.experimental.topologies`.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np

from mtv_jax.parallel.distributed import gather_json
from mtv_jax.utils.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, a single JAX device."""

  kind: str  # Such as 'v5e', 'cpu' or 'H100'.
  hbm_bytes: int | None  # Limit of a program; None if unknown.
  peak_bf16_flops: float | None  # Dense FLOP/s; None if unknown.
  axes: int = 0  # Dimensions of the torus; 0 without a torus.
  hbm_bandwidth: float | None = None  # Bytes per second.
  # Bytes per second that a chip receives over all links; None if unknown.
  link_bandwidth: float | None = None
  host_bandwidth: float | None = None  # Bytes per second from or to the host.
  peak_int8_flops: float | None = None  # Operations per second.


def _make_tpu(kind: str, axes: int, gib: float, *rates: float) -> Chip:
  bf16, int8, hbm, links = rates
  return Chip(
    kind,
    int(gib * 2**30),
    bf16,
    axes,
    hbm_bandwidth=hbm,
    link_bandwidth=links,
    host_bandwidth=16e9,  # PCIe 3 with 16 lanes.
    peak_int8_flops=int8,
  )


# Axes, GiB, bfloat16 FLOP/s, int8 operations/s, bytes/s of HBM and of links.
# Rates: cloud.google.com/tpu/docs. Memory: the limit in the compiler's
# out-of-memory error.
TPUS = {
  "v4": _make_tpu("v4", 3, 30.75, 275e12, 275e12, 1.2e12, 3e11),
  "v5e": _make_tpu("v5e", 2, 15.75, 197e12, 393e12, 819e9, 2e11),
  "v5p": _make_tpu("v5p", 3, 95.73, 459e12, 918e12, 2765e9, 6e11),
  "v6e": _make_tpu("v6e", 2, 31.24, 918e12, 1836e12, 1.6e12, 4e11),
}
_GPUS_PER_HOST = 8


def _make_gpu(model: str, gigabytes: int, peak_flops: float | None) -> Chip:
  # CUDA, NCCL and the allocator use some of the nominal memory.
  return Chip(model, int(0.92 * gigabytes * 1e9), peak_flops)


# GB and dense bfloat16 FLOP/s, from NVIDIA's data sheets.
GPUS = {
  "A100-40GB": _make_gpu("A100-40GB", 40, 312e12),
  "A100-80GB": _make_gpu("A100-80GB", 80, 312e12),
  "H100": _make_gpu("H100", 80, 989e12),
  "H200": _make_gpu("H200", 141, 989e12),
  "L4": _make_gpu("L4", 24, 121e12),
}
# Shapes of two-dimensional slices by number of chips.
_SHAPES = {
  1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8",
  128: "8x16", 256: "16x16",
}  # fmt: skip
_NAME_PATTERN = re.compile(
  r"(?:(?P<slices>\d+)x)?(?P<kind>[a-z]\w*)"
  r"(?P<separator>[:-])(?P<shape>[\w.-]+)"
)
_ALIASES = {"v5litepod": "v5e"}
# Our names by JAX's `device_kind`.
_DEVICE_KINDS = {
  "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
  "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip
EXAMPLES = "v5e:16x16, v4:4x4x8, 2xv5e:16x16 (two slices), cpu:8, gpu:8xH100"


@dataclasses.dataclass(frozen=True)
class Topology:
  """A parsed topology name."""

  name: str
  chip: Chip
  chips: int  # Total over all slices.
  hosts: int  # Total over all slices.
  shape: str = ""  # Torus of a slice, such as '16x16'; '' without a torus.
  slices: int = 1  # Connected by the data-centre network.
  host_bounds: tuple[int, int, int] = (1, 1, 1)  # Chips per host, by axis.
  is_local: bool = False  # This run's devices, see `describe_local`.

  @property
  def is_tpu(self) -> bool:
    """Whether the chips are TPUs, so that programs compile for them exactly."""
    return self.chip.axes > 0

  @property
  def canonical_name(self) -> str:
    """A TPU topology's name with its shape, such as '2xv5e:16x16'."""
    slices = f"{self.slices}x" if self.slices > 1 else ""
    return f"{slices}{self.chip.kind}:{self.shape}"

  def __str__(self) -> str:
    counts = [(self.chips, "chip"), (self.hosts, "host")]
    if self.slices > 1:
      counts.append((self.slices, "slice"))
    texts = (f"{n} {unit}{'s' if n > 1 else ''}" for n, unit in counts)
    return f"{self.name}: {', '.join(texts)}"


def parse(name: str) -> Topology:
  """Parses a topology name, see `EXAMPLES`.

  'KIND:SHAPE' or 'KIND-CHIPS' is a TPU slice; the prefix 'Nx' means N slices.
  'gpu:NxMODEL' or 'gpu:NxSIZEGB' is N GPUs, 'cpu:N' N CPU devices.
  """
  try:
    return _parse(name)
  except ConfigError as error:
    raise ConfigError(f"topology {name!r}: {error}") from None


def _parse(name: str) -> Topology:
  match = _NAME_PATTERN.fullmatch(name)
  if match is None:
    raise ConfigError(f"expected KIND:SHAPE, such as {EXAMPLES}")
  kind, separator, shape = match["kind"], match["separator"], match["shape"]
  kind = _ALIASES.get(kind, kind)
  kinds = [*TPUS, "cpu", "gpu"]
  if kind not in kinds:
    raise ConfigError(did_you_mean(kind, kinds))
  slices = int(match["slices"] or 1)
  if kind in TPUS and slices > 0:
    return _parse_tpus(name, TPUS[kind], separator, shape, slices)
  if slices != 1 or separator == "-":
    raise ConfigError(f"only TPUs come in slices; examples: {EXAMPLES}")
  count, _, model = shape.partition("x" if kind == "gpu" else ":")
  chips, chip = _parse_count(count), Chip("cpu", None, None)
  if kind == "cpu":
    return Topology(name, chip, chips, hosts=1)
  size = re.fullmatch(r"(\d+)GB", model)
  if not size and model not in GPUS:
    raise ConfigError(
      f"unknown GPU; write gpu:{chips}xMODEL or, by its memory, "
      f"gpu:{chips}x80GB. {did_you_mean(model, GPUS)}"
    )
  chip = _make_gpu(model, int(size[1]), None) if size else GPUS[model]
  return Topology(name, chip, chips, -(-chips // _GPUS_PER_HOST))


def _parse_tpus(
  name: str, chip: Chip, separator: str, shape: str, slices: int
) -> Topology:
  example = f"such as {chip.kind}:{'x'.join('4' * chip.axes)}"
  if separator == "-":
    count = _parse_count(shape)
    if chip.axes != 2 or count not in _SHAPES:
      raise ConfigError(
        f"KIND-CHIPS is for v5e and v6e, with {sorted(_SHAPES)} chips; pass "
        f"the shape instead, {example}"
      )
    shape = _SHAPES[count]
  sides = [_parse_count(side) for side in shape.split("x")]
  if len(sides) != chip.axes:
    raise ConfigError(
      f"{chip.kind} is a torus of {chip.axes} dimensions, {example}"
    )
  chips = math.prod(sides)
  bounds = (1, 1, 1) if chips == 1 else (2, 2, 1)
  if sides == [2, 4]:  # One host; larger slices have four chips per host.
    bounds = (2, 4, 1)
  if any(s % b for s, b in zip(sides, bounds, strict=False)):
    raise ConfigError(
      f"hosts of {'x'.join(map(str, bounds))} chips do not divide the slice; "
      f"sides are 1 (a single chip), 2, 4, 8, ..., {example}"
    )
  if chip.axes == 2 and chips > max(_SHAPES):
    raise ConfigError(
      f"a slice of {chip.kind} has at most 256 chips (16x16); for more, use "
      f"slices: 2x{chip.kind}:16x16"
    )
  hosts = slices * chips // math.prod(bounds)
  return Topology(name, chip, slices * chips, hosts, shape, slices, bounds)


def name_devices(devices: Sequence[jax.Device]) -> str:
  """Names the topology of TPUs, such as 'v5e:16x16'; '' for other devices."""
  kind = _DEVICE_KINDS.get(devices[0].device_kind)
  if kind is None:
    return ""
  coords = [device.coords for device in devices]
  sides = np.ptp(coords, axis=0) + 1
  shape = "x".join(map(str, sides[: TPUS[kind].axes]))
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  return Topology("", TPUS[kind], 0, 0, shape, slices).canonical_name


def describe_local() -> Topology:
  """Describes this run's devices; all processes must call it together."""
  # Only local devices have memory statistics.
  device = jax.local_devices()[0]
  kind = device.device_kind
  if device.platform == "cpu":
    chip = Chip("cpu", None, None)
  elif device.platform == "tpu":
    if kind not in _DEVICE_KINDS:
      raise ConfigError(f"{kind} is not supported; {sorted(TPUS)} are")
    chip = TPUS[_DEVICE_KINDS[kind]]
  else:
    limits = gather_json((device.memory_stats() or {}).get("bytes_limit"))
    chip = Chip(kind, None if None in limits else min(limits), None)
  count, hosts = jax.device_count(), jax.process_count()
  return Topology("local", chip, count, hosts, is_local=True)


def _parse_count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise ConfigError(
      f"{text!r} is not a number of chips; examples: {EXAMPLES}"
    )
  return int(text)


def get_devices(topology: Topology) -> list[jax.Device]:
  """Devices to compile for: compile-only TPUs, or CPUs in place of GPUs."""
  if topology.is_local:
    return jax.devices()
  if not topology.is_tpu:
    cpus = jax.devices("cpu")
    if len(cpus) < topology.chips:
      raise ConfigError(
        f"topology {topology.name!r}: JAX has {len(cpus)} CPU devices; call "
        "topologies.use_cpu() before it starts a backend."
      )
    return cpus[: topology.chips]
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"topology {topology.name!r}: the TPU compiler, libtpu, is not installed "
      "(pip install 'mtv_jax[preflight]', Linux only; needs no TPU)."
    )
  from jax.experimental import topologies

  options = {
    "chips_per_host_bounds": list(topology.host_bounds),
    "num_slices": topology.slices,
  }
  if topology.chip.kind == "v4":
    options["chip_config_name"] = "megacore"  # Joins a chip's two cores.
  # Without these, libtpu looks for a TPU and locks it.
  environment = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  added_names = {k: v for k, v in environment.items() if k not in os.environ}
  os.environ.update(added_names)
  try:
    return topologies.get_topology_desc(
      f"{topology.chip.kind}:{topology.shape}", platform="tpu", **options
    ).devices
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"topology {topology.name!r}: the TPU compiler rejects it: {error}"
    ) from error
  finally:
    for name in added_names:
      del os.environ[name]


def use_cpu(topology: Topology | None = None) -> None:
  """Restricts JAX to CPU devices, as many as a CPU or GPU topology has.

  Call this before JAX starts a backend.
  """
  jax.config.update("jax_platforms", "cpu")
  if topology and not topology.is_tpu and topology.chips > 1:
    jax.config.update("jax_num_cpu_devices", topology.chips)
