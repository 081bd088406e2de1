"""Machines that need not be there: topologies to compile for, and their chips.

`devices("v5e:16x16")` are 256 devices of the TPU compiler, from the package
`libtpu`, on any machine: programs are lowered and compiled for them, with the
chips' real out-of-memory errors, and can't be run. This is the only file that
knows JAX's experimental interface to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax

from mtv_jax.utils.errors import ConfigError, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as JAX has it: one device.

  Attributes:
    kind: such as 'v5e', 'cpu' or 'H100'.
    hbm_bytes: what a program may use of its memory; None where that is not
      limited or not known. Of TPUs it is what the compiler allows.
    peak_bf16_flops: dense bfloat16 operations a second, as the vendor states
      them; None where not known.
    hbm_bandwidth: bytes a second; None where not known.
    per_host: chips of a host in a machine of several hosts.
    axes: dimensions of its topologies; 0 for no torus.
    config: the compiler's name for the two cores of a chip as one device.
  """

  kind: str
  hbm_bytes: int | None
  peak_bf16_flops: float | None
  hbm_bandwidth: float | None = None
  per_host: int = 4
  axes: int = 0
  config: str = "default"


def _gib(size: float) -> int:
  return int(size * GIB)


# Peaks: cloud.google.com/tpu/docs. Memory: what the compiler says is available
# when a program does not fit.
TPUS = {
  "v4": Chip("v4", _gib(30.75), 275e12, 1.2e12, axes=3, config="megacore"),
  "v5e": Chip("v5e", _gib(15.75), 197e12, 0.82e12, axes=2),
  "v5p": Chip("v5p", _gib(95.73), 459e12, 2.77e12, axes=3),
  "v6e": Chip("v6e", _gib(31.24), 918e12, 1.64e12, axes=2),
}
# NVIDIA's data sheets, dense; the memory they name less what CUDA, NCCL and
# the allocator keep for themselves.
_GPU_SHARE = 0.92
GPUS = {
  "A100-40GB": Chip("A100-40GB", int(_GPU_SHARE * 40e9), 312e12, 1.56e12, 8),
  "A100-80GB": Chip("A100-80GB", int(_GPU_SHARE * 80e9), 312e12, 2.04e12, 8),
  "H100": Chip("H100", int(_GPU_SHARE * 80e9), 989e12, 3.35e12, 8),
  "H200": Chip("H200", int(_GPU_SHARE * 141e9), 989e12, 4.8e12, 8),
  "L4": Chip("L4", int(_GPU_SHARE * 24e9), 121e12, 0.3e12, 8),
}
# Of the two-dimensional kinds, by number of chips as clouds sell them.
_SQUARES = {
  1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8",
  128: "8x16", 256: "16x16",
}  # fmt: skip
_NAME = re.compile(
  r"(?:(?P<slices>\d+)x)?(?P<kind>[a-z]\w*)(?P<sign>[:-])(?P<shape>[\w.-]+)"
)
# As clouds name them.
_ALSO = {"v5litepod": "v5e"}
EXAMPLES = "v5e:16x16, v4:4x4x8, 2xv5e:16x16 (two slices), cpu:8, gpu:8xH100"


@dataclasses.dataclass(frozen=True)
class Topology:
  """A parsed name: which chips, how many, how they are cut into hosts.

  Attributes:
    name: as it was given.
    chip: each of them.
    shape: the torus of a slice, as text such as '16x16'; '' for none.
    slices: copies of it, joined by the data-centre network.
    chips: of all slices.
    hosts: of all slices.
  """

  name: str
  chip: Chip
  shape: str
  slices: int
  chips: int
  hosts: int

  @property
  def is_tpu(self) -> bool:
    """Whether the program is compiled for the chips themselves."""
    return self.chip.axes > 0

  def __str__(self) -> str:
    slices = f", {self.slices} slices" if self.slices > 1 else ""
    chips = "chip" if self.chips == 1 else "chips"
    hosts = "host" if self.hosts == 1 else "hosts"
    return f"{self.name}: {self.chips} {chips}, {self.hosts} {hosts}{slices}"


def parse(name: str) -> Topology:
  """What a name stands for.

  Args:
    name: 'KIND:SHAPE' of a TPU ('v5e:16x16', 'v4:4x4x8'; 'v5e-256' is
      'v5e:16x16', and so is 'v5litepod-256'), with 'Nx' before it for N
      slices; 'cpu:N' for N devices of this machine's CPU; 'gpu:NxMODEL' or
      'gpu:NxSIZEGB' for N GPUs.

  Raises:
    ConfigError: for a name that stands for nothing.
  """
  found = _NAME.fullmatch(name)
  kinds = [*TPUS, "cpu", "gpu"]
  if found is None:
    raise ConfigError(f"no topology is called {name!r}. Such are: {EXAMPLES}.")
  kind, sign, shape = found["kind"], found["sign"], found["shape"]
  kind = _ALSO.get(kind, kind)
  slices = int(found["slices"] or 1)
  if kind not in kinds:
    raise ConfigError(f"topology {name!r}: {did_you_mean(kind, kinds)}")
  if slices < 1 or (kind not in TPUS and (slices > 1 or sign == "-")):
    raise ConfigError(
      f"topology {name!r}: only TPUs come in slices. Such are: {EXAMPLES}."
    )
  if kind == "cpu":
    count = _whole(name, shape)
    cpu = Chip("cpu", None, None, per_host=count)
    return Topology(name, cpu, "", 1, count, 1)
  if kind == "gpu":
    return _gpus(name, shape)
  return _tpus(name, TPUS[kind], sign, shape, slices)


def _tpus(name: str, chip: Chip, sign: str, shape: str, slices: int):
  if sign == "-":
    count = _whole(name, shape)
    if chip.axes != 2 or count not in _SQUARES:
      sizes = ", ".join(f"{k}-{n}" for k in ("v5e", "v6e") for n in (16, 256))
      raise ConfigError(
        f"topology {name!r}: numbers of chips are understood of v5e and v6e, "
        f"and of {sorted(_SQUARES)} ({sizes}); give the shape, such as "
        f"{chip.kind}:{'x'.join('4' * chip.axes)}."
      )
    shape = _SQUARES[count]
  sides = [_whole(name, side) for side in shape.split("x")]
  if len(sides) != chip.axes:
    raise ConfigError(
      f"topology {name!r}: {chip.kind} is a torus of {chip.axes} dimensions, "
      f"such as {chip.kind}:{'x'.join('4' * chip.axes)}."
    )
  bounds = _host_bounds(chip, sides)
  if any(s % b for s, b in zip(sides, bounds, strict=False)):
    raise ConfigError(
      f"topology {name!r}: hosts of {'x'.join(map(str, bounds))} chips do not "
      "divide it. Sides are 1 (alone), 2, 4, 8, ..., such as "
      f"{chip.kind}:{'x'.join('4' * chip.axes)}."
    )
  chips = math.prod(sides)
  if chip.axes == 2 and chips > max(_SQUARES):
    raise ConfigError(
      f"topology {name!r}: a slice of {chip.kind} has at most "
      f"{max(_SQUARES)} chips ({_SQUARES[max(_SQUARES)]}); more of them are "
      f"several slices, such as 2x{chip.kind}:16x16."
    )
  hosts = chips // math.prod(bounds)
  return Topology(name, chip, shape, slices, slices * chips, slices * hosts)


def _host_bounds(chip: Chip, sides: list[int]) -> tuple[int, int, int]:
  """Chips of a host along each side."""
  if math.prod(sides) == 1:
    return (1, 1, 1)
  # Eight chips of v5e or v6e are sold as one host; more, in hosts of four.
  if chip.axes == 2 and sides == [2, 4]:
    return (2, 4, 1)
  return (2, 2, 1)


def _gpus(name: str, shape: str) -> Topology:
  count, _, model = shape.partition("x")
  number = _whole(name, count)
  size = re.fullmatch(r"(\d+)GB", model)
  if size:
    chip = Chip(model, int(_GPU_SHARE * int(size[1]) * 1e9), None, per_host=8)
  elif model in GPUS:
    chip = GPUS[model]
  else:
    raise ConfigError(
      f"topology {name!r}: which GPU? Write gpu:{number}xMODEL or, by its "
      f"memory, gpu:{number}x80GB. {did_you_mean(model, GPUS)}"
    )
  hosts = -(-number // chip.per_host)
  return Topology(name, chip, "", 1, number, hosts)


def _whole(name: str, text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise ConfigError(
      f"topology {name!r}: {text!r} is no number of chips. Such are: "
      f"{EXAMPLES}."
    )
  return int(text)


def chip(name: str) -> Chip:
  """The chip of a topology.

  Raises:
    ConfigError: for a name that stands for nothing.
  """
  return parse(name).chip


def devices(name: str) -> list[jax.Device]:
  """Devices to compile for.

  Those of a TPU can only be compiled for. For GPUs they are devices of this
  machine's CPU: their program is another compiler's, and its memory an
  estimate.

  Args:
    name: see `parse`.

  Raises:
    ConfigError: for a name that stands for nothing, a missing TPU compiler, or
      more CPU devices than this process has.
  """
  topology = parse(name)
  if topology.is_tpu:
    return _tpu_devices(topology)
  found = jax.devices("cpu")
  if len(found) < topology.chips:
    raise ConfigError(
      f"topology {name!r}: this process has {len(found)} CPU devices. Call "
      "topologies.use_cpu() before anything else touches a device."
    )
  return found[: topology.chips]


def use_cpu(name: str | None = None) -> None:
  """Makes this process one of CPU devices, as many as a topology needs.

  A machine with a TPU would otherwise start it, and then could not compile for
  another. To be called before JAX starts a backend.

  Args:
    name: of the topology that is to be compiled for.
  """
  jax.config.update("jax_platforms", "cpu")
  if name is None:
    return
  topology = parse(name)
  if not topology.is_tpu and topology.chips > 1:
    jax.config.update("jax_num_cpu_devices", topology.chips)


def _tpu_devices(topology: Topology) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"topology {topology.name!r}: the TPU compiler is not installed. "
      "pip install 'mtv_jax[preflight]' brings it (the package libtpu; Linux "
      "only). It needs no TPU."
    )
  from jax.experimental import topologies

  sides = [int(side) for side in topology.shape.split("x")]
  options = {
    "chips_per_host_bounds": list(_host_bounds(topology.chip, sides)),
    "num_slices": topology.slices,
  }
  if topology.chip.config != "default":
    options["chip_config_name"] = topology.chip.config
  try:
    with _quiet():
      found = topologies.get_topology_desc(
        f"{topology.chip.kind}:{topology.shape}", platform="tpu", **options
      )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"topology {topology.name!r}: the TPU compiler refuses it: {error}"
    ) from error
  return list(found.devices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """While libtpu starts: it need not look for a TPU, nor complain of none.

  Nor does it claim one, so that several processes may compile at a time.
  """
  answers = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  added = [name for name in answers if name not in os.environ]
  os.environ.update({name: answers[name] for name in added})
  try:
    yield
  finally:
    for name in added:
      del os.environ[name]
