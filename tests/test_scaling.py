"""Chips, counted and formulated work, and collectives read from compiled text; nothing compiles."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from helpers import MODEL
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, PartitionSpec

from r4b_jax.common import cost
from r4b_jax.common.arrays import ImagePlan
from r4b_jax.common.chips import GIB, Chip, chip_of, chip_of_device
from r4b_jax.config import ModelConfig
from r4b_jax.data.examples import empty_batch
from r4b_jax.decoding.generate import Ids, Prompts, generate
from r4b_jax.decoding.sampling import Sampling
from r4b_jax.models import r4b
from r4b_jax.scaling.collectives import collectives, shape_bytes, summary, wire_bytes
from r4b_jax.training.losses import supervised_loss

R4B = ModelConfig()
TERA = 1e12


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def flops(function, *args, **kwargs) -> float:
    return cost.executed_flops(jax.make_jaxpr(function)(*args), **kwargs).total


# Chips


def test_a_topology_names_its_chip_and_a_wrong_one_the_known():
    assert chip_of("v5e:16x16").name == "v5e"
    assert chip_of("h200:8").hbm == 141e9
    with pytest.raises(ValueError, match="v5litepod:16.*v4, v5e, v5p, v6e"):
        chip_of("v5litepod:16")


def test_a_share_of_a_chip():
    """jax sees two devices in a tpu7x; a whole one's memory would let in what does not fit."""
    assert chip_of("tpu7x:2x2x1").share(2).hbm == 94.74 * GIB


# Executed FLOPs: all of 2 * 3 * 5 * 7 = 210 for x @ y

X, Y, SQUARE = shape(3, 5), shape(5, 7), shape(4, 4)
CUBE = 2 * 4**3  # of SQUARE @ SQUARE


def test_products():
    assert flops(jnp.matmul, X, Y) == 210
    assert flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), shape(9, 3, 5), shape(9, 5, 7)) == (
        9 * 210
    )


def test_convolution():
    """8 x 8 outputs of 6 channels, each over a 3 x 3 window of 2 channels (4 in 2 groups)."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    counted = flops(convolve, shape(1, 8, 8, 4), shape(3, 3, 2, 6))
    assert counted == 2 * (8 * 8 * 6) * (3 * 3 * 2)


def test_a_gradient_costs_two_more_products_and_remat_a_third():
    """A backward pass computes a layer's first product again, but nobody needs its second."""

    def loss(x, v, w):
        return (jnp.sin(jnp.sin(x @ v) @ w)).sum()

    all_three = (0, 1, 2)
    plain = flops(jax.value_and_grad(loss, all_three), SQUARE, SQUARE, SQUARE)
    assert plain == 6 * CUBE

    def layer(x, v, w):
        return jnp.sin(x @ v) @ w

    again = jax.value_and_grad(lambda *args: jax.checkpoint(layer)(*args).sum(), all_three)
    assert flops(again, SQUARE, SQUARE, SQUARE) == (2 + 1 + 4) * CUBE


def test_what_nothing_depends_on_is_not_counted():
    def one_of_two(x):
        return jax.jit(lambda x: (x @ x, x @ x @ x))(x)[0], (x @ x).shape

    assert flops(one_of_two, SQUARE) == 3 * CUBE  # the jit has both results, the last product none


def test_loops_and_calls():
    def scanned(x):
        body = jax.jit(lambda x, _: (x @ x, None))
        return jax.lax.scan(body, x, None, 3)[0]

    assert flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: scanned(x), x), SQUARE) == 15 * CUBE


def test_a_loop_of_unknown_length_is_named_and_takes_the_callers_count():
    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    jaxpr = jax.make_jaxpr(loop)(SQUARE, 3)
    counted = cost.executed_flops(jaxpr)
    (name,) = counted.unknown_loops
    assert counted.total == CUBE
    assert "tests/test_scaling.py" in name and "loop" in name
    told = cost.executed_flops(jaxpr, trips={"elsewhere": 9, "test_scaling.py": 7})
    assert (told.total, told.unknown_loops) == (7 * CUBE, {name: 7})


def test_branches():
    """The dearest of a condition; of a choice by platform, the caller's."""

    def condition(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

    def by_platform(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x @ x @ x)

    assert flops(condition, SQUARE) == 2 * CUBE
    assert flops(by_platform, SQUARE, platform="tpu") == CUBE
    assert flops(by_platform, SQUARE, platform="cuda") == 3 * CUBE


def test_custom_derivatives():
    @jax.custom_vjp
    def twice(x):
        return x @ x

    twice.defvjp(lambda x: (x @ x, x), lambda x, d: (d @ x @ x @ x,))
    assert flops(twice, SQUARE) == CUBE
    assert flops(jax.value_and_grad(lambda x: twice(x).sum()), SQUARE) == 4 * CUBE


def test_a_split_program_counts_as_the_whole():
    """Each of 4 devices multiplies a quarter: the result is that of one device with everything."""
    mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = PartitionSpec("a")
    split = jax.shard_map(
        lambda x, y: x @ y,
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        axis_names={"a"},
    )
    x, y = shape(12, 5), shape(5, 7)
    assert flops(jax.jit(split), x, y) == flops(jnp.matmul, x, y)


@pytest.mark.parametrize("estimate", [None, pl.CostEstimate(99, 0, 0)], ids=["body", "estimate"])
def test_kernels(estimate):
    """A 2 x 3 grid of products, unless the author says what they cost."""

    def kernel(x, out):
        out[...] = x[...] @ x[...]

    block = pl.BlockSpec((4, 4), lambda i, j: (i, j))
    call = pl.pallas_call(
        kernel, shape(8, 12), grid=(2, 3), in_specs=[block], out_specs=block, cost_estimate=estimate
    )
    counted = cost.executed_flops(jax.make_jaxpr(call)(shape(8, 12)))
    assert counted.kernels == counted.total == (6 * CUBE if estimate is None else 99)


# The formulas


def test_the_formula_gives_the_figures_of_the_full_model():
    """16,384 tokens in one document, 16 tiles, loss on all: TFLOPs of an independent prototype."""
    length = 16384
    parts = cost.train_flops(R4B, length, 16, length, cost.causal_pairs(length))
    expected = {"layers": 357.2, "head": 38.2, "vision": 32.6, "attention": 237.5}
    assert {k: v / TERA for k, v in parts.items()} == pytest.approx(expected, abs=0.06)
    assert sum(parts.values()) / TERA == pytest.approx(665, abs=1)


def test_the_formula_counts_the_models_own_program():
    """The forward pass, a third of training, scores all pairs of a short row; the program also
    mixes image features into the sequence."""
    rows, length, tiles = 2, 64, 3
    params = jax.eval_shape(lambda: r4b.init(MODEL, jax.random.key(0)))
    batch = jax.eval_shape(lambda: empty_batch(rows, length, tiles, MODEL.vision, 0))
    counted = flops(
        lambda p, b: supervised_loss(r4b.bind(MODEL, p), b, MODEL.loss_chunk), params, batch
    )
    tokens = rows * length
    parts = cost.train_flops(MODEL, tokens, rows * tiles, tokens, tokens * length)
    mixing = 2 * math.prod(batch.plan.weight.shape) * MODEL.language.width
    assert counted == sum(parts.values()) / 3 + mixing


def test_the_formula_counts_a_step_of_the_decoders_own_program():
    queries, rollouts, prefix, suffix, tiles = 3, 5, 24, 7, 1
    params = jax.eval_shape(lambda: r4b.init(MODEL, jax.random.key(0)))
    ints, pixels = jnp.int32, MODEL.vision.image_size
    prompts = Prompts(
        shape(queries, prefix, dtype=ints),
        shape(queries, dtype=ints),
        shape(queries, tiles, pixels, pixels, 3, dtype=jnp.uint8),
        ImagePlan(shape(queries, prefix, 4, dtype=ints), shape(queries, prefix, 4)),
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (queries, rollouts)))
    run = functools.partial(
        generate, MODEL, ids=Ids(3, 0, 1, 2, 4, never=()), max_new_tokens=suffix
    )
    jaxpr = jax.make_jaxpr(lambda *args: run(*args, sampling=Sampling.of(1.0)))(
        params, prompts, shape(queries, rollouts, 2, dtype=ints), keys
    )
    one, two = (cost.executed_flops(jaxpr, trips={" decode": n}).total for n in (1, 2))
    work = cost.Decoding(queries, rollouts, prefix, suffix)
    assert two - one == cost.decode_flops(MODEL, work)


@pytest.mark.parametrize(
    "chip, devices, queries, length, by_half, by_all",
    [
        ("v5e", 8, 1, 8192, 716, 468),
        ("v5e", 8, 4, 8192, 1067, 597),
        ("v6e", 1, 3, 2048, 4602, 3233),
        ("v6e", 4, 4, 8192, 2137, 1196),
        ("v5p", 1, 12, 2048, 11988, 7245),
        ("h200", 1, 20, 2048, 22442, 13155),
    ],
)
def test_decoding_ceilings_of_the_full_model(chip, devices, queries, length, by_half, by_all):
    """Tokens a second and chip, groups of 16 after 4,096 tokens, where a step reads the half of the
    new tokens' cache that is written on average, or all of it."""
    for suffix, expected in ((length / 2, by_half), (length, by_all)):
        work = cost.Decoding(queries, 16, 4096, suffix)
        assert cost.decode_rate(R4B, work, chip_of(chip), devices) == pytest.approx(expected, 2e-3)


def test_roofline():
    """2 s of compute beside 4 s on the links, or with three quarters of those before or after."""
    chip = Chip("toy", peak=10, hbm=0, bandwidth=10, links=1)
    beside = cost.roofline(20, 10, 4, chip)
    assert (beside.seconds, beside.bound, beside.compute, beside.memory) == (4, "links", 2, 1)
    assert cost.roofline(20, 10, 4, chip, exposed_share=0.75).seconds == 2 + 3
    assert cost.roofline(20, 10, 0, chip).utilisation(15, chip) == 0.75


# Collectives: lines as libtpu 0.0.52 wrote them for v5e, shortened

BODY_ADDS_ONE = """
%cond.{n} (p: (s32[], f32[4])) -> pred[] {{
  %bound.{n} = s32[]{{:T(128)}} constant({bound})
  %p.{n} = (s32[]{{:T(128)}}, f32[4]{{0}}) parameter(0)
  %i.{n} = s32[]{{:T(128)}} get-tuple-element(%p.{n}), index=0
  ROOT %lt.{n} = pred[]{{:T(512)}} compare(%i.{n}, %bound.{n}), direction=LT
}}

%body.{n} (q: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %one.{n} = s32[]{{:T(128)}} constant({step})
  %q.{n} = (s32[]{{:T(128)}}, f32[4]{{0}}) parameter(0)
  %j.{n} = s32[]{{:T(128)}} get-tuple-element(%q.{n}), index=0
  %copy.{n} = s32[]{{:T(128)}} copy(%j.{n})
  %next.{n} = s32[]{{:T(128)}} add(%copy.{n}, %one.{n}), backend_config={{"flag_configs":[]}}
  %x.{n} = f32[4]{{0}} get-tuple-element(%q.{n}), index=1
{lines}
  ROOT %t.{n} = (s32[]{{:T(128)}}, f32[4]{{0}}) tuple(%next.{n}, %x.{n})
}}
"""
ENTRY = """HloModule jit_step, is_scheduled=true, num_partitions=8

{computations}
ENTRY %main.1 (a: f32[4], n: s32[]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
{lines}
  ROOT %r = f32[4]{{0}} copy(%a)
}}
"""
RUN = """  %start.{n} = (s32[]{{:T(128)}}, f32[4]{{0}}) tuple(%zero, %a)
  %while.{n} = (s32[], f32[4]{{0}}) while(%start.{n}), condition=%cond.{n}, body=%body.{n}
"""


def program(lines: str, computations: str = "") -> str:
    return ENTRY.format(computations=computations, lines=lines)


def looped(lines: str, computations: str = "", bound=36, step=1) -> str:
    """A program whose loop runs the lines."""
    body = BODY_ADDS_ONE.format(n=1, bound=bound, step=step, lines=lines)
    return program(RUN.format(n=1), computations + body)


def seen(text: str, **kwargs) -> list[tuple]:
    return [
        (c.kind, c.devices, c.result, c.runs, c.overlapped) for c in collectives(text, **kwargs)
    ]


def test_bytes_of_a_shape():
    assert shape_bytes("bf16[36,1,4096]{2,1,0:T(8,128)(2,1)S(1)}") == 36 * 4096 * 2
    assert shape_bytes("(f32[3]{0}, /*index=1*/pred[5], s4[8], f8e4m3fn[2], u32[]{:S(2)})") == (
        12 + 5 + 4 + 2 + 4
    )


SYNCHRONOUS = """
  %all-gather.42 = bf16[1,2560,4864]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}, use_global_device_ids=true
  %all-reduce.7 = (bf16[8,2]{1,0}, f32[4]{0}) all-reduce(%a, %a), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add.clone
  %all_to_all.14 = bf16[4,1024]{1,0} all-to-all(%copy.9), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={2}
  %reduce_scatter.18 = bf16[1024,256]{1,0} reduce-scatter(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%region_10.11
"""  # noqa: E501


def test_synchronous_collectives_and_their_groups():
    """Three of them share channel 1, as under `shard_map`: none is left out for that."""
    assert seen(program(SYNCHRONOUS)) == [
        ("all-gather", 4, 2560 * 4864 * 2, 1, False),
        ("all-reduce", 2, 32 + 16, 1, False),
        ("all-to-all", 4, 4 * 1024 * 2, 1, False),
        ("reduce-scatter", 8, 1024 * 256 * 2, 1, False),
    ]
    # Of n devices each: (n-1)/n of a gathered result, twice that of a reduced one, n-1 parts.
    sent = 2560 * 4864 * 2 * 3 / 4 + 48 + 8192 * 3 / 4 + 7 * 1024 * 256 * 2
    assert wire_bytes(collectives(program(SYNCHRONOUS))) == (sent, sent)


PERMUTES = """
  %collective-permute-start.2 = (bf16[320,9728]{{1,0:T(8,128)(2,1)}}, bf16[320,9728]{{1,0:T(8,128)(2,1)}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%a), channel_id=9, source_target_pairs={{{{0,1}},{{1,0}}}}, frontend_attributes={{is_spmd_generated="true"}}
{between}
  %collective-permute-done.2 = bf16[320,9728]{{1,0:T(8,128)(2,1)}} collective-permute-done(%collective-permute-start.2)
"""  # noqa: E501
PRODUCT = "  %fusion.124 = bf16[2,320,9728]{2,1,0} fusion(%a), kind=kOutput, calls=%fused.18"
INDEX = "  %index.3 = u32[] fusion(%zero), kind=kLoop, calls=%fused.19"


@pytest.mark.parametrize("between, overlapped", [(PRODUCT, True), (INDEX, False), ("", False)])
def test_what_starts_and_is_done_counts_once_and_overlaps_with_work_between(between, overlapped):
    """A step of 2 up to 4, as in a windowed einsum, is 2 runs."""
    text = looped(PERMUTES.format(between=between), bound=4, step=2)
    assert seen(text) == [("collective-permute", 8, 320 * 9728 * 2, 2, overlapped)]


PIECE = """
%{name} (p: bf16[1,9728,320]) -> bf16[1,9728,2560] {{
  %p.{n} = bf16[1,9728,320]{{1,2,0}} parameter(0)
  ROOT %all-gather.{n} = bf16[1,9728,2560]{{1,2,0}} all-gather(%p.{n}), channel_id=2, replica_groups=mesh['axis_0'=8] {{'axis_0'}}, dimensions={{2}}, frontend_attributes={{chain_id="0"}}
}}
"""  # noqa: E501
SPREAD = """
  %async-collective-start = (bf16[1,9728,320]{1,2,0}, bf16[1,9728,2560]{1,2,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%fused_computation.92
  %fusion.132 = (bf16[1,2048,9728]{2,1,0}, bf16[1,9728,2560]{1,2,0}) fusion(%a), kind=kOutput, calls=%async_collective_fusion.132
  %async-collective-done = bf16[1,9728,2560]{1,2,0} fusion(%a), kind=kCustom, calls=%fused_computation.94
"""  # noqa: E501


def test_a_collective_spread_over_fusions_counts_once():
    names = ("fused_computation.92", "async_collective_fusion.132", "fused_computation.94")
    pieces = "".join(PIECE.format(name=name, n=i) for i, name in enumerate(names))
    assert seen(looped(SPREAD, pieces)) == [("all-gather", 8, 9728 * 2560 * 2, 36, True)]


SCATTER = """
%all-reduce-scatter.1.clone.1 (input.4: bf16[9728,2560]) -> bf16[9728,80] {
  %input.4 = bf16[9728,2560]{0,1} parameter(0)
  %all-reduce.11 = bf16[9728,2560]{0,1} all-reduce(%input.4), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.7 = bf16[9728,80]{0,1} dynamic-slice(%all-reduce.11, %o), dynamic_slice_sizes={9728,80}
}
"""  # noqa: E501
SCATTERS = "  %fusion.107 = bf16[9728,80]{0,1} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1.clone.1"  # noqa: E501


def test_a_reduction_that_is_sliced_on_the_way_is_a_reduce_scatter():
    """Of 80 columns, not an all-reduce of 2,560."""
    assert seen(looped(SCATTERS, SCATTER)) == [("reduce-scatter", 4, 9728 * 80 * 2, 36, False)]


def test_loops():
    """Within each other they multiply; what only the device knows is told apart."""
    gather = "  %g.{n} = f32[8]{{0}} all-gather(%x.{n}), channel_id=1, replica_groups={{}}"
    inner = BODY_ADDS_ONE.format(n=2, bound=3, step=1, lines=gather.format(n=2))
    nested = "  %zero = s32[] constant(0)\n" + RUN.format(n=2).replace("%a", "%x.1")
    outer = BODY_ADDS_ONE.format(n=1, bound=5, step=1, lines=nested)
    text = program(RUN.format(n=1), inner + outer)
    assert seen(text) == [("all-gather", 8, 32, 15, False)]
    endless = text.replace("%bound.1 = s32[]{:T(128)} constant(5)", "%bound.1 = s32[] random(%z)")
    assert seen(endless, unknown_trips=100) == [("all-gather", 8, 32, 300, False)]
    assert [c.unknown_runs for c in collectives(text) + collectives(endless)] == [False, True]
    told = endless.replace(
        "body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert seen(told) == [("all-gather", 8, 32, 21, False)]


SLICES = """
  %send.1 = (bf16[256,8,128]{2,1,0}, u32[]{:S(2)}, token[]) send(%a, %after-all.1), channel_id=4, is_host_transfer=true
  %recv.1 = (bf16[256,8,128]{2,1,0}, u32[]{:S(2)}, token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true
  %send-done.1 = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
"""  # noqa: E501


def test_what_leaves_a_slice_is_no_traffic_of_its_links():
    found = collectives(program(SLICES))
    assert [(c.kind, c.result) for c in found] == [("send", 256 * 8 * 128 * 2)]
    assert wire_bytes(found) == (0, 0)


def test_summary():
    """Of two permutes one waits for nothing: they make two lines. Most bytes sent come first."""
    permutes = PERMUTES.format(between=PRODUCT) + PERMUTES.replace(".2", ".3").format(between="")
    lines = summary(collectives(program(permutes)) + collectives(looped(SCATTERS, SCATTER)))
    permute, scattered = 320 * 9728 * 2, 36 * 9728 * 80 * 2

    def line(kind, overlapped, runs, result, wire):
        keys = ("kind", "overlapped", "count", "runs", "bytes", "wire")
        return dict(zip(keys, (kind, overlapped, 1, runs, result, wire)))

    assert lines == [
        line("reduce-scatter", False, 36, scattered, 3 * scattered),
        line("collective-permute", True, 1, permute, permute),
        line("collective-permute", False, 1, permute, permute),
    ]


@pytest.mark.parametrize(
    "text", ["", "no program", "ENTRY %m (a: f32[]) -> f32[] {\n  ???\n  %x = "]
)
def test_text_that_is_no_program_has_no_collectives(text):
    assert collectives(text) == []


def test_what_is_frozen_costs_less():
    """MFU of a warm-up stage would else be flattered threefold by a tower that only looks."""
    config, work = ModelConfig(), (1000, 2, 700, 5000)
    whole = cost.train_flops(config, *work)
    warmup = cost.train_flops(config, *work, trained=("projector", "image_newline"))
    third = {name: value / 3 for name, value in whole.items()}
    assert warmup["vision"] == pytest.approx(third["vision"])
    assert warmup["layers"] == pytest.approx(2 * third["layers"])  # the gradient goes through
    assert warmup["attention"] == pytest.approx(whole["attention"])  # it has no kernels


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_what_jax_calls_it(kind, name):
    """The wrong chip would give a wrong MFU, no chip none."""
    chip = chip_of_device(kind)
    assert (chip and chip.name) == name
