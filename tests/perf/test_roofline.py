"""Bytes that a compiled program reads and writes, in HBM and on the host."""

import pytest

from mtv_jax.perf import hlo, roofline, topologies

# A loop of four iterations: each reads a row of %x, and updates a row of %y
# in-place. The last array is in another memory.
TPU = """HloModule jit_f, is_scheduled=true

%fused (p.0: s32[], p.1: f32[4,1024], p.2: f32[4,1024]) -> f32[4,1024] {
  %p.0 = s32[]{:T(128)} parameter(0)
  %p.1 = f32[4,1024]{1,0:T(4,128)} parameter(1)
  %p.2 = f32[4,1024]{1,0:T(4,128)} parameter(2)
  %b.1 = f32[4,1024]{1,0:T(4,128)} bitcast(%p.1)
  %row = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%b.1, %p.0, %p.0)
  %sum = f32[1,1024]{1,0:T(1,128)} add(%row, %row)
  ROOT %dus = f32[4,1024]{1,0:T(4,128)} dynamic-update-slice(%p.2, %sum, \
%p.0, %p.0)
}

%body (p: (s32[], f32[4,1024], f32[4,1024])) -> (s32[], f32[4,1024], \
f32[4,1024]) {
  %p = (s32[]{:T(128)S(6)}, f32[4,1024]{1,0:T(4,128)}, \
f32[4,1024]{1,0:T(4,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %x = f32[4,1024]{1,0:T(4,128)} get-tuple-element(%p), index=1
  %y = f32[4,1024]{1,0:T(4,128)} get-tuple-element(%p), index=2
  %new = f32[4,1024]{1,0:T(4,128)} fusion(%i, %x, %y), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[4,1024], f32[4,1024]) tuple(%i, %x, %new)
}

%condition (q: (s32[], f32[4,1024], f32[4,1024])) -> pred[] {
  %q = (s32[], f32[4,1024], f32[4,1024]) parameter(0)
  ROOT %t = pred[]{:T(512)S(6)} constant(true)
}

ENTRY %main (x: f32[4,1024]) -> f32[4,1024] {
  %x.1 = f32[4,1024]{1,0:T(4,128)} parameter(0)
  %y.0 = f32[4,1024]{1,0:T(4,128)} custom-call(), \
custom_call_target="AllocateBuffer"
  %y.1 = f32[4,1024]{1,0:T(4,128)} copy(%x.1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (s32[], f32[4,1024], f32[4,1024]) tuple(%zero, %x.1, %y.1)
  %loop = (s32[], f32[4,1024], f32[4,1024]) while(%start), \
condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %y.2 = f32[4,1024]{1,0:T(4,128)} get-tuple-element(%loop), index=2
  %go = (f32[4,1024]{1,0:T(4,128)S(1)}, f32[4,1024]{1,0:T(4,128)}, u32[]) \
copy-start(%y.2)
  %fast = f32[4,1024]{1,0:T(4,128)S(1)} copy-done(%go)
  ROOT %z = f32[4,1024]{1,0:T(4,128)} negate(%fast)
}
""".replace("\\\n", "")


def test_slices_and_updates_in_place_count_what_they_touch():
  whole, row = 4 * 1024 * 4, 1024 * 4
  copy, loop = 2 * whole, 4 * 2 * row
  prefetch = whole  # Read, and written to another memory.
  assert roofline.count_hbm_bytes(TPU) == copy + loop + prefetch + whole


# A row is written to an array in the host's memory, and read back.
OFFLOADING = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[1,4096]) -> bf16[1,4096] {
  %x = bf16[1,4096]{1,0:T(2,128)(2,1)} parameter(0)
  %host = bf16[3,4096]{1,0:T(4,128)(2,1)S(5)} custom-call(), \
custom_call_target="AllocateBuffer"
  %zero = s32[]{:T(128)S(6)} constant(0)
  %out = ((bf16[3,4096]{1,0:T(4,128)(2,1)S(5)}, \
bf16[1,4096]{1,0:T(2,128)(2,1)}, s32[], s32[]), \
bf16[3,4096]{1,0:T(4,128)(2,1)S(5)}, u32[]{:S(2)}) \
dynamic-update-slice-start(%host, %x, %zero, %zero)
  %held = bf16[3,4096]{1,0:T(4,128)(2,1)S(5)} dynamic-update-slice-done(%out)
  %in = ((bf16[3,4096]{1,0:T(4,128)(2,1)S(5)}, s32[], s32[]), \
bf16[1,4096]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}) \
dynamic-slice-start(%held, %zero, %zero)
  %back = bf16[1,4096]{1,0:T(2,128)(2,1)} dynamic-slice-done(%in)
  ROOT %y = bf16[1,4096]{1,0:T(2,128)(2,1)} fusion(%back), kind=kLoop, \
calls=%f, backend_config={"estimated_cycles":"700"}
}

%f (p: bf16[1,4096]) -> bf16[1,4096] {
  %p = bf16[1,4096]{1,0:T(2,128)(2,1)} parameter(0)
  ROOT %n = bf16[1,4096]{1,0:T(2,128)(2,1)} negate(%p)
}
""".replace("\\\n", "")


def test_arrays_on_the_host_count_as_they_are_moved():
  row = 2 * 4096 * 2  # Padded to two rows.
  assert roofline.count_host_bytes(OFFLOADING) == 2 * row
  # Read to be sent, written as it returns, and negated.
  assert roofline.count_hbm_bytes(OFFLOADING) == 4 * row
  assert roofline.count_host_bytes(TPU) == 0
  assert hlo.count_cycles(OFFLOADING) == 700
  for cycles in (2**64 - 1, 2**64 // 12):
    unknown = OFFLOADING.replace("700", str(cycles))
    assert hlo.count_cycles(unknown) == 0


def test_the_slowest_resource_is_the_bound():
  chip = topologies.TPUS["v5e"]
  work = dict(flops=197e12, hbm_bytes=2 * 819e9, received=100e9)
  bound = roofline.estimate(chip, **work)
  assert bound.compute == 1 and bound.total == bound.memory == 2
  assert bound.links == pytest.approx(0.5)
  assert bound.host == 0
  assert roofline.estimate(chip, **work, host_bytes=64e9).total == 4
  half = roofline.estimate(chip, **work, int8_flops=197e12 / 2)
  assert half.compute == pytest.approx(0.75, rel=1e-2)
  gpu = topologies.GPUS["H100"]
  assert roofline.estimate(gpu, **work) is None
