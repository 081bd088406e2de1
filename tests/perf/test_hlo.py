"""Compiled HLO: collectives, loops, FLOPs, layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtv_jax.perf import hlo

# Text of the TPU compiler: trip counts are only in the condition.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%body (p.1: (s32[], bf16[512,64])) -> (s32[], bf16[512,64]) {
  %p.1 = (s32[]{:T(128)}, bf16[512,64]{0,1:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %w.1 = bf16[512,64]{0,1:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %all-gather.1 = bf16[512,512]{0,1:T(8,128)(2,1)} all-gather(%w.1), \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}, \
metadata={op_name="jit(f)/while/body/dot_general"}
  ROOT %out.1 = (s32[], bf16[512,64]) tuple(%next, %w.1)
}

%condition (p.2: (s32[], bf16[512,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  %p.2 = (s32[]{:T(128)}, bf16[512,64]{0,1:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (x: f32[128,512], w: bf16[512,64]) -> f32[128,512] {
  %x = f32[128,512]{1,0:T(8,128)} parameter(0)
  %w = bf16[512,64]{0,1:T(8,128)(2,1)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %start = (s32[], bf16[512,64]) tuple(%first, %w)
  %while.1 = (s32[], bf16[512,64]) while(%start), condition=%condition, \
body=%body
  %go = (f32[128,512]{1,0}, f32[128,512]{1,0}, u32[], u32[]) \
collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[128,512]{1,0} collective-permute-done(%go)
  %all-reduce.1 = (f32[128,512]{1,0}, f32[128,512]{1,0}) \
all-reduce(%x, %done), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %narrow = f32[9,4]{1,0:T(8,128)} slice(%x), \
metadata={op_name="jit(f)/narrow"}
}
""".replace("\\\n", "")


def test_kernels_count_by_their_estimate():
  """A Pallas call's backend_config, as jax.experimental.pallas writes it."""
  text = """HloModule jit_f

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config": {"body": "TUzvUg==", "cost_estimate": \
{"transcendentals": 8, "flops": 4096, "bytes_accessed": 64}}}
  ROOT %z = f32[8,128]{1,0} custom-call(%y), custom_call_target="Sharding"
}
""".replace("\\\n", "")
  assert hlo.count_flops(text) == 4096


def test_collectives_in_loops_are_multiplied():
  rows = {row.kind: row for row in hlo.list_collectives(TPU)}
  # The counter goes from 1 by 2 to below 11; three other chips send.
  gather = rows["all-gather"]
  assert (gather.count, gather.group) == (5, 4)
  assert gather.bytes == 5 * 3 * 512 * 64 * 2
  assert gather.result == 4 * 512 * 64 * 2
  assert gather.scope == "jit(f)/while/body/dot_general"
  # Start and done count once; both operands of one collective count.
  assert rows["collective-permute"].bytes == 128 * 512 * 4
  reduce = rows["all-reduce"]
  assert reduce.group == 4
  assert reduce.bytes == pytest.approx(2 * 3 / 4 * 2 * 128 * 512 * 4)
  assert hlo.sum_by_kind(rows.values())["all-gather"] == (5, gather.bytes)


def test_largest_temporaries_include_padding():
  rows = hlo.find_largest_temporaries(TPU)
  assert rows[0]["shape"] == "bf16[512,512]"
  narrow = next(row for row in rows if row["shape"] == "f32[9,4]")
  assert narrow["bytes"] == 16 * 128 * 4
  assert narrow["scope"] == "jit(f)/narrow"


def test_group_size_parses_all_formats():
  module = hlo.parse(TPU)
  gather = module.computations["body"]["all-gather.1"]

  def size(text):
    instruction = hlo.Instruction("a", "all-gather", (), "", text)
    return hlo.read_group_size(instruction, module.partitions)

  assert hlo.read_group_size(gather, 8) == 4
  assert size("replica_groups={{0,2,4},{1,3,5}}") == 3
  assert size("replica_groups=[4,2]<=[8]") == 2
  assert size("replica_groups={}") == 8
  assert size("replica_groups=mesh['a'=8] {'a':(2)4}") == 4


def test_chained_pieces_are_one_collective():
  def piece(role):
    ends = f'custom-call(%g.{role}), custom_call_target="AsyncCollective{role}"'
    return f"""%{role} (x.{role}: f32[64]) -> f32[256] {{
  %x.{role} = f32[64]{{0}} parameter(0)
  %g.{role} = f32[256]{{0}} all-gather(%x.{role}), replica_groups=[1,4]<=[4], \
frontend_attributes={{chain_id="0"}}
  ROOT %e.{role} = f32[256]{{0}} {ends if role != "Step" else "copy(%g.Step)"}
}}
"""

  text = "HloModule m, num_partitions=4\n\n"
  text += piece("Start") + piece("Step") + piece("Done")
  text += """ENTRY %e (a: f32[64]) -> f32[256] {
  %a = f32[64]{0} parameter(0)
  %one = f32[256]{0} fusion(%a), kind=kCustom, calls=%Start
  %two = f32[256]{0} fusion(%a), kind=kCustom, calls=%Step
  ROOT %last = f32[256]{0} fusion(%a), kind=kCustom, calls=%Done
}
"""
  (row,) = hlo.list_collectives(text)
  assert (row.count, row.bytes) == (1, 3 * 64 * 4)


def test_products_of_splash_attention_count_in_every_layer():
  """A kernel's metadata spans lines; one starts with braces."""
  text = """HloModule m, num_partitions=1

%body (x: (s32[], bf16[2,3,256,64])) -> (s32[], bf16[2,3,256,64]) {
  %x = (s32[], bf16[2,3,256,64]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %q = bf16[2,3,256,64]{3,2,1,0} get-tuple-element(%x), index=1
  %mask = s8[1,1,1]{2,1,0} constant({...})
  %fwd = bf16[2,3,256,64]{3,2,1,0} custom-call(%mask, %q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_residuals/pallas_call"}
  %dkv = bf16[2,3,256,64]{3,2,1,0} custom-call(%mask, %q, %q, %q, %fwd), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/splash_mha_dkv_no_residuals/pallas_call"}
  ROOT %y = (s32[], bf16[2,3,256,64]{3,2,1,0}) tuple(%i, %dkv)
}

%condition (x: (s32[], bf16[2,3,256,64])) -> pred[] {
  %x = (s32[], bf16[2,3,256,64]{3,2,1,0}) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %e (x: (s32[], bf16[2,3,256,64])) -> (s32[], bf16[2,3,256,64]) {
  %x = (s32[], bf16[2,3,256,64]{3,2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[2,3,256,64]{3,2,1,0}) while(%x), \
condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
}
""".replace("\\\n", "")
  products = 12 * (2 + 5)
  assert hlo.count_flops(text) == products * 2 * 2 * 3 * 256**2 * 64


def test_text_without_entry_raises():
  with pytest.raises(ValueError, match="lacks ENTRY"):
    hlo.parse("nothing")


@pytest.fixture(scope="module")
def compiled():
  """Matrix products in a loop of five, each with a psum over eight devices."""
  mesh = jax.make_mesh((8,), ("a",), devices=jax.devices()[:8])

  def local(x, w):
    def step(x, _):
      return jax.lax.psum(jnp.tanh(x @ w), "a"), None

    return jax.lax.scan(step, x, None, length=5)[0]

  function = jax.shard_map(
    local, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
  )
  replicated = NamedSharding(mesh, P())
  shapes = [
    jax.ShapeDtypeStruct(s, np.float32, sharding=replicated)
    for s in ((16, 32), (32, 32))
  ]
  return jax.jit(function).lower(*shapes).compile()


def test_collectives_of_a_compiled_program(compiled):
  (row,) = hlo.list_collectives(compiled)
  assert (row.kind, row.count, row.group) == ("all-reduce", 5, 8)
  assert row.bytes == pytest.approx(5 * 2 * 7 / 8 * 16 * 32 * 4)


def test_convolution_flops_skip_padding():
  text = """HloModule m, num_partitions=1

ENTRY %e (a: f32[4,8,8,3], b: f32[3,3,3,5]) -> f32[4,8,8,5] {
  %a = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %c = f32[4,8,8,5]{3,2,1,0} convolution(%a, %b), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
""".replace("\\\n", "")
  # At either edge one of the 3 taps reads padding: 8 * 3 - 2 per axis.
  assert hlo.count_flops(text) == 2 * 22 * 22 * 3 * 4 * 5
  assert hlo.count_flops(text, "s8") == 0
  eight = text.replace("f32[4,8,8,3]", "s8[4,8,8,3]")
  assert hlo.count_flops(eight, "s8") == 0  # Only one operand is s8.
  eight = eight.replace("f32[3,3,3,5]", "s8[3,3,3,5]")
  assert hlo.count_flops(eight, "s8") == hlo.count_flops(text)


def test_the_usual_branch_of_a_conditional_counts():
  def f(rare, x):
    return jax.lax.cond(rare, lambda x: x @ x @ x, lambda x: x @ x, x)

  x = jnp.ones((64, 64))
  compiled = jax.jit(f).lower(False, x).compile()
  assert hlo.count_flops(compiled) == 2 * 64**3
