"""The Triton kernel: in Triton's interpreter, compiled without a device, and on a GPU where there is one.

The interpreter must be switched on before Triton is imported, so that this file also runs as a program: one process
computes what several tests look at and prints it as JSON.
"""

import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products_harness import fewer
from torch import Tensor

from fxprune.errors import KernelError
from fxprune.inference.kernels import gather_conv, triton_conv
from fxprune.inference.kernels.triton_conv import Tile, tiles

HARNESSES = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Triton 3.9 announces a default to come, whatever runs on it.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]

# --- the table ------------------------------------------------------------------------------------------------------

# A result is rounded once from a float32 sum: to 11 bits in float16 and to 8 in bfloat16, to which the interpreter
# truncates. TF32 has 11 bits in each operand.
TOLERANCE = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7, "tf32": 2**-8}
KERNELS = {
    # (height, width) of kernel, stride, padding, dilation and image
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), (5, 7)),
    "1x1 stride 2": ((1, 1), (2, 2), (0, 0), (1, 1), (9, 12)),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), (5, 7)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1), (1, 1), (10, 13)),
    "3x3 dilated": ((3, 3), (1, 1), (2, 2), (2, 2), (5, 7)),
    "rectangular": ((2, 3), (2, 1), (0, 2), (1, 2), (11, 6)),
}
KEPT = {1: (5, 19), 8: (8, 24), 16: (16, 48)}  # not all multiples of a step, even ones of runs
SEED = 5  # of a table in which all pairs occur
CLAMPS = {"none": (None, None), "relu": (0.0, None), "relu6": (0.0, 6.0), "below": (None, 0.5)}


@dataclass(frozen=True)
class Case:
    """One call of the kernel."""

    kernel: str
    dtype: str
    groups: int
    block: int
    kept: int
    filters: int  # of a group
    bias: bool
    ordered: bool
    residual: bool
    clamp: str
    BK: int
    layout: str  # of the weight
    index: str
    wide: bool
    batch: int = 1


def table() -> list[Case]:
    """Every kernel with every number of groups and every block, the types in turn, and the rest drawn."""
    draw = random.Random(SEED)
    numbered = itertools.product(enumerate(KERNELS), enumerate((1, 2, 4)), enumerate((1, 8, 16)))
    return [
        Case(
            kernel,
            ("float32", "float16", "bfloat16")[(i + j + k) % 3],
            groups,
            block,
            KEPT[block][draw.random() < 0.5 and groups < 4],
            draw.choice([3, 20] if groups == 1 else [3, 16]),
            draw.random() < 0.5,
            draw.random() < 0.5,
            draw.random() < 0.5,
            draw.choice(list(CLAMPS)),
            draw.choice([16, 32]),
            draw.choice(["packed", "contiguous", "channels_last"]),
            draw.choice(["int16", "int32", "int64"]),
            draw.random() < 0.5,
            2 if groups == 1 else 1,
        )
        for (i, kernel), (j, groups), (k, block) in numbered
    ]


def representatives() -> list[Case]:
    """A third of the table: of every two of kernel, groups and block all pairs."""
    numbered = itertools.product(range(len(KERNELS)), range(3), range(3))
    return [case for case, (i, j, k) in zip(table(), numbered, strict=True) if k == (i + j) % 3]


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def draw_index(groups: int, kept: int, block: int, channels: int) -> Tensor:
    """Runs of each group, in any order, none twice."""
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.randperm(channels // block, generator=generator)[: kept // block] for _ in range(groups)]
    return (torch.cat(chosen)[:, None] * block + torch.arange(block)).flatten()


def difference(case: Case, kernels: ModuleType, device: str = "cpu", tile: Tile | None = None) -> float:
    """How far the kernel is from `conv2d` in float64, as a share of the largest value; not a number counts as far."""
    size, stride, padding, dilation, image = KERNELS[case.kernel]
    dtype = getattr(torch, case.dtype)
    channels = case.kept + 2 * case.block + 3  # neither the channels nor the bytes of a pixel are a round number
    index = draw_index(case.groups, case.kept, case.block, channels)
    filters = case.groups * case.filters
    x = normal(case.batch, channels, *image, seed=2, dtype=dtype, device=device)
    weight = normal(filters, case.kept, *size, seed=3, dtype=dtype, device=device) * 2 * weight_scale(case, size)
    bias = normal(filters, seed=4, dtype=dtype, device=device) if case.bias else None
    order = torch.arange(filters)
    if not case.ordered:
        order = torch.randperm(filters, generator=torch.Generator().manual_seed(6))

    options = (stride, padding, dilation, case.groups)
    gathered = x.double().index_select(1, index.to(device))
    expected = F.conv2d(gathered, weight.double(), None if bias is None else bias.double(), *options)
    expected = expected.index_select(1, order.to(device))
    residual = None
    if case.residual:
        residual = channels_last(normal(*expected.shape, seed=5, dtype=dtype, device=device))
        expected = expected + residual.double()
    minimum, maximum = CLAMPS[case.clamp]
    if case.clamp != "none":
        expected = expected.clamp(minimum, maximum)

    weight = {
        "packed": gather_conv.pack(weight),
        "contiguous": weight.contiguous(),
        "channels_last": channels_last(weight),
    }[case.layout]
    index = index.to(device, getattr(torch, case.index))
    places = None if case.ordered else order.argsort().to(device, torch.int64 if case.index == "int64" else torch.int32)
    out = channels_last(torch.full(expected.shape, torch.nan, dtype=dtype, device=device))
    kernels.convolve(
        channels_last(x), weight, bias, index, places, residual, out, *options, case.block, minimum, maximum,
        tile=tile, wide=case.wide,
    )  # fmt: skip
    far = ((out.double() - expected).abs().max() / expected.abs().max()).item()
    return far if far == far else torch.inf


def weight_scale(case: Case, size: Sequence[int]) -> float:
    return float((case.kept * size[0] * size[1]) ** -0.5)


# --- ways to break the kernel: what is replaced by what, and a case that must show it ---------------------------------

PLAIN = Case("1x1", "float32", 2, 8, 24, 3, True, False, True, "relu6", 16, "packed", "int64", False)
TAPS = replace(PLAIN, kernel="3x3")
SIDES = replace(PLAIN, kernel="rectangular")
BROKEN = {
    "the index is shifted": ("(run + k % BLOCK", "(run + 1 + k % BLOCK", PLAIN),
    "the index of a long run is shifted": ("(tl.int32), BK)", "(tl.int32), BK) + 1", replace(PLAIN, block=16, kept=32)),
    "the index of a channel is shifted": ("channel[None, :]", "(channel[None, :] + 1)", replace(PLAIN, block=1)),
    "no bias": ("if bias is not None", "if False", PLAIN),
    "places as they come": ("if places is not None", "if False", PLAIN),
    "places of the first group": ("tl.load(places + filter", "tl.load(places + member", PLAIN),
    "bias in the order of the output": ("bias + filter", "bias + tl.load(places + filter, member < filters)", PLAIN),
    "residual in the order of the filters": (
        "residual + offset", "residual + pixel[:, None] * (groups * filters) + filter[None, :]", PLAIN
    ),
    "no residual": ("if residual is not None", "if False", PLAIN),
    "no lower bound": ("if MINIMUM is not None", "if False", PLAIN),
    "no upper bound": ("if MAXIMUM is not None", "if False", PLAIN),
    "rows below the image": ("(y < height)", "(y <= height)", replace(TAPS, batch=2)),
    "columns beside the image": ("(z >= 0)", "(z >= -1)", TAPS),
    "stride of the other axis": ("out_height * SH", "out_height * SW", SIDES),
    "dilation of the other axis": ("KW * DW", "KW * DH", SIDES),
    "padding of the other axis": ("SW - PW", "SW - PH", SIDES),
    "taps transposed": ("KW * weight_h + tap % KW * weight_w", "KW * weight_w + tap % KW * weight_h", TAPS),
    "filters of the first group": ("group * filters + member", "member", PLAIN),
    "kept channels rounded down": ("(KEPT + BK - 1) // BK", "KEPT // BK", PLAIN),
    "pixels rounded down": ("exists = pixel < pixels", "exists = pixel < pixels - 1", PLAIN),
}  # fmt: skip


def broken(old: str, new: str, folder: Path) -> ModuleType:
    """The module of the kernel with one piece of its source replaced."""
    source = Path(triton_conv.__file__).read_text(encoding="utf-8")
    assert old in source, f"{old!r} is no longer in the source of the kernel"
    path = folder / f"broken_{len(list(folder.iterdir()))}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def not_a_number() -> list[bool]:
    """Where the output is NaN if one pixel of the input is, under ReLU6: everywhere its window reaches."""
    x = torch.ones(1, 8, 3, 3)
    x[0, 0, 0, 0] = torch.nan
    out = channels_last(torch.zeros(1, 4, 3, 3))
    args = (torch.ones(4, 8, 1, 1), None, torch.arange(8), None, None, out, (1, 1), (0, 0), (1, 1), 1, 8, 0.0, 6.0)
    triton_conv.convolve(channels_last(x), *args, tile=Tile(16, 16, 16, 1))
    return [bool(n) for n in out.isnan().any(1).flatten()]


def beyond_32_bits() -> list[float]:
    """Sums over the last channels of an input of more than 2**31 elements, of which only a few are ever touched."""
    channels = 2**30 + 8
    x = channels_last(torch.zeros(1, channels, 1, 2, dtype=torch.float16))
    x[0, -8:, 0, 1] = torch.arange(8, dtype=torch.float16)
    out = channels_last(torch.zeros(1, 1, 1, 2, dtype=torch.float16))
    args = (torch.arange(channels - 8, channels), None, None, out, (1, 1), (0, 0), (1, 1), 1, 8, None, None)
    triton_conv.convolve(x, torch.ones(1, 8, 1, 1, dtype=torch.float16), None, *args, tile=Tile(16, 16, 16, 1))
    return [float(n) for n in out.flatten()]


def tile(case: Case) -> Tile:
    """Small enough for two programs along each axis, of which the last is not full."""
    return Tile(64, 16, case.BK, stages=1)


def interpret(what: str) -> object:
    """What the process that interprets the kernel prints."""
    if what == "beyond 32 bits":
        return beyond_32_bits()
    if what == "table":
        return [difference(case, triton_conv, tile=tile(case)) for case in table()]
    with tempfile.TemporaryDirectory() as folder:
        modules = {why: broken(old, new, Path(folder)) for why, (old, new, _) in BROKEN.items()}
        return {
            "representatives": [difference(case, triton_conv, tile=tile(case)) for case in representatives()],
            "sound": [
                difference(case, triton_conv, tile=tile(case)) for case in {case for _, _, case in BROKEN.values()}
            ],
            "broken": {why: difference(case, modules[why], tile=tile(case)) for why, (_, _, case) in BROKEN.items()},
            "not a number": not_a_number(),
        }


def interpreted(what: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, what],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HARNESSES)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- in the interpreter ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> Any:
    return interpreted("the rest")


def test_every_pair_of_variants_is_in_the_table() -> None:
    """Of what the kernel has code for, every two ways occur together."""
    cases = [
        (c.kernel, c.dtype, c.groups, c.block, c.bias, c.ordered, c.residual, c.clamp, c.BK, c.layout, c.index, c.wide)
        for c in table()
    ]
    for one, other in itertools.combinations(range(len(cases[0])), 2):
        found = {(case[one], case[other]) for case in cases}
        possible = set(itertools.product({case[one] for case in cases}, {case[other] for case in cases}))
        assert found == possible, possible - found


def test_every_variant_is_among_the_representatives() -> None:
    for field in fields(Case):
        if field.name == "kept":  # drawn anew for each block
            continue
        assert {getattr(c, field.name) for c in representatives()} == {getattr(c, field.name) for c in table()}
    for one, other in itertools.combinations(("kernel", "groups", "block"), 2):
        pairs = {(getattr(c, one), getattr(c, other)) for c in representatives()}
        assert pairs == {(getattr(c, one), getattr(c, other)) for c in table()}


def far(cases: list[Case], differences: list[float]) -> dict[str, float]:
    return {str(case): away for case, away in zip(cases, differences, strict=True) if not away <= TOLERANCE[case.dtype]}


@needs_triton
def test_the_kernel_is_the_convolution(results: Any) -> None:
    assert far(representatives(), results["representatives"]) == {}


@pytest.mark.slow
@needs_triton
def test_the_kernel_is_the_convolution_in_the_whole_table() -> None:
    assert len(table()) > 50
    assert far(table(), interpreted("table")) == {}


@needs_triton
@pytest.mark.parametrize("why", BROKEN)
def test_control_a_broken_kernel_is_far(results: Any, why: str) -> None:
    tolerance = TOLERANCE[BROKEN[why][2].dtype]
    assert max(results["sound"]) <= tolerance < 1000 * tolerance < results["broken"][why]


@needs_triton
def test_not_a_number_stays_one(results: Any) -> None:
    assert results["not a number"] == [True] + [False] * 8


@pytest.mark.huge
@needs_triton
def test_offsets_beyond_32_bits() -> None:
    assert interpreted("beyond 32 bits") == [0.0, 28.0]


# --- compiled for a device that is not here ---------------------------------------------------------------------------


def ptx(block: int, dtype: str, unit: int, weight: str = "weight_o", ordered: bool = True, index: str = "*i16") -> str:
    """Assembly for sm_90 of a 3x3 kernel, for numbers of channels and filters that `unit` divides."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped,unused-ignore]
    from triton.compiler import ASTSource, compile  # type: ignore[import-untyped,unused-ignore]

    kernel = triton_conv._kernel
    constants: dict[str, Any] = {
        "KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1, "KEPT": 128, "BLOCK": block,
        "MINIMUM": 0.0, "MAXIMUM": None, "CHANNELS_UNIT": unit, "FILTERS_UNIT": unit,
        "UNIT_O": unit, "UNIT_K": unit, "UNIT_H": unit, "UNIT_W": unit, "WIDE": False,
        "PRECISION": "tf32" if dtype == "fp32" else "ieee", "UPCAST": False,
        "BM": 128, "BN": 64, "BK": 32 if dtype == "fp32" else 64, weight: 1,
    }  # fmt: skip
    constants["UNIT_" + weight[-1].upper()] = 1
    pointers = {name: f"*{dtype}" for name in ("x", "weight", "bias", "residual", "out")}
    pointers |= {"index": index, "places": "*i32"}
    if ordered:
        del pointers["places"]
        constants["places"] = None
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in pointers},
    )
    options = {"num_warps": triton_conv.WARPS, "num_stages": 3, "enable_fp_fusion": True}
    try:
        assembly: str = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    except (RuntimeError, FileNotFoundError, OSError) as error:  # no ptxas for it
        pytest.skip(f"this Triton does not compile for a device that is absent: {error}")
    return assembly


def loads(assembly: str) -> dict[str, int]:
    """Number of loads from global memory, by kind."""
    return {
        "16 bytes": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, (?:0x10|16)[,;]", assembly)),
        "4 bytes": len(re.findall(r"cp\.async\.ca\.shared\.global[^;]*, (?:0x4|4)[,;]", assembly)),
        "2 bytes": len(re.findall(r"ld\.global\.b16", assembly)),
    }


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("block", fewer([8, 64], [8]))
def test_aligned_runs_are_read_16_bytes_at_a_time(block: int) -> None:
    assembly = ptx(block, "fp16", unit=8)
    assert "wgmma.mma_async" in assembly
    assert loads(assembly)["2 bytes"] <= 3 * 8  # the index: a thread reads 8 channels a step
    # (128 pixels + 64 filters) x 64 channels x 2 bytes, by 128 threads, for the two steps loaded ahead and the loop's
    assert loads(assembly)["16 bytes"] >= 2 * (128 + 64) * 64 * 2 // 16 // 128


@needs_triton
@pytest.mark.usefixtures("own_cache")
def test_short_indices_let_copies_run_ahead() -> None:
    """Before a product the kernel waits for its own operands, and not for those of the next one, which are under way.

    Two copies are one step's operands; the control is an index that is moved by such copies itself.
    """
    waits = {
        index: re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", ptx(8, "fp16", 8, index=index))
        for index in ("*i16", "*i32")
    }
    assert "2" in waits["*i16"]
    assert set(waits["*i32"]) == {"0"}


@needs_triton
@pytest.mark.usefixtures("own_cache")
def test_scattered_places_cost_nothing_but_in_the_epilogue() -> None:
    ordered, scattered = (loads(ptx(8, "fp16", unit=8, ordered=ordered)) for ordered in (True, False))
    assert scattered["16 bytes"] == ordered["16 bytes"]
    assert scattered["2 bytes"] == ordered["2 bytes"] + 128 * 64 // 128  # the residual, by 128 threads


@needs_triton
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    "block, unit",
    [
        pytest.param(1, 8, id="single channels"),
        pytest.param(8, 1, id="odd numbers of channels", marks=pytest.mark.slow),
    ],
)
def test_control_others_are_not(block: int, unit: int) -> None:
    assert loads(ptx(block, "fp16", unit))["2 bytes"] >= 32


@needs_triton
@pytest.mark.usefixtures("own_cache")
def test_packed_float32_is_read_16_bytes_at_a_time() -> None:
    innermost_filters, innermost_kept = (loads(ptx(8, "fp32", 8, weight)) for weight in ("weight_o", "weight_k"))
    assert innermost_kept["4 bytes"] < 8 <= 32 <= innermost_filters["4 bytes"]
    assert gather_conv.pack(torch.zeros(16, 8, 3, 3)).stride(1) == 1
    assert gather_conv.pack(torch.zeros(16, 8, 3, 3, dtype=torch.float16)).stride(0) == 1


# --- the choice of tiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", triton_conv.DTYPES)
def test_tiles_fit_the_group(dtype: torch.dtype) -> None:
    for pixels, filters, kept in itertools.product((1, 64, 65, 100_000), (1, 16, 17, 64, 100, 512), (1, 8, 40, 512)):
        chosen = tiles(pixels, filters, kept, dtype)
        assert 1 <= len(chosen) == len(set(chosen)) <= 3
        for BM, BN, BK, stages in chosen:
            assert BM in (64, 128)
            assert 16 <= BN <= 128
            assert BN < 2 * max(filters, 16)  # less than half is wasted
            assert 16 <= BK < 2 * max(kept, 16)
            assert BK <= 128 // dtype.itemsize
            assert stages * (BM + BN) * BK * dtype.itemsize <= 160 * 1024  # shared memory of the smallest: A100


@needs_triton
def test_every_tile_is_among_the_configurations() -> None:
    """Otherwise the tuner would be left with none."""
    x = torch.zeros(1, dtype=torch.float16)
    for pixels, filters, kept in itertools.product((1, 1000), (1, 24, 48, 500), (1, 24, 48, 500)):
        named = {"pixels": pixels, "filters": filters, "KEPT": kept}
        left = triton_conv._worthwhile(triton_conv._tuned_kernel.configs, named, x=x)
        assert len(left) == len(tiles(pixels, filters, kept, x.dtype))
        assert {config.num_warps for config in left} == {triton_conv.WARPS} == {4}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float32_is_rounded_to_tf32_only_where_conv2d_does(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            expected = "tf32" if allowed and dtype == "float32" else "ieee"
            assert triton_conv._precision(getattr(torch, dtype)) == expected
    finally:
        torch.backends.cudnn.allow_tf32 = before


# --- on the device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_cuda) for case in table()], ids=str)
def test_the_kernel_on_the_device(case: Case) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False) if case.dtype == "float32" else (before,):
            torch.backends.cudnn.allow_tf32 = allowed
            tolerance = TOLERANCE["tf32" if allowed and case.dtype == "float32" else case.dtype]
            candidates = tiles(1000, case.filters, case.kept, getattr(torch, case.dtype))
            for batch, chosen in ((case.batch, candidates[0]), (3 * case.batch, candidates[-1])):
                assert difference(replace(case, batch=batch), triton_conv, "cuda", chosen) <= tolerance
    finally:
        torch.backends.cudnn.allow_tf32 = before


def on_the_device(batch: int, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    x = normal(batch, 64, 14, 14, seed=2, dtype=dtype, device="cuda")
    return {
        "x": channels_last(x),
        "weight": gather_conv.pack(normal(64, 16, 3, 3, seed=3, dtype=dtype, device="cuda") / 12),
        "bias": normal(64, seed=4, dtype=dtype, device="cuda"),
        "index": draw_index(2, 16, 8, 64).to("cuda"),
        "places": torch.randperm(64, generator=torch.Generator().manual_seed(6)).to("cuda"),
        "residual": channels_last(normal(batch, 64, 14, 14, seed=5, dtype=dtype, device="cuda")),
        "padding": (1, 1), "groups": 2, "block": 8, "minimum": 0.0,
    }  # fmt: skip


def composed(arguments: dict[str, Any]) -> Tensor:
    """The same by plain operators in float64."""
    exact: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return gather_conv.gather_conv2d(**exact)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_cuda) for dtype in triton_conv.DTYPES], ids=str)
def test_the_tuned_kernel(dtype: torch.dtype) -> None:
    arguments = on_the_device(4, dtype)
    expected = composed(arguments)
    for _ in range(2):  # tuned, and then found
        y = gather_conv.gather_conv2d(**arguments)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the refusal leaves it so
@pytest.mark.parametrize("batch", [pytest.param(5, marks=on_cuda)])
def test_a_cuda_graph(batch: int) -> None:
    arguments = on_the_device(batch)
    triton_conv._tuned.clear()
    with pytest.raises(KernelError, match=r"not chosen yet.*run the model once before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            gather_conv.gather_conv2d(**arguments)
    torch.cuda.synchronize()
    gather_conv.gather_conv2d(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gather_conv.gather_conv2d(**arguments)
    for factor in (1, -2):
        arguments["x"].mul_(factor)
        graph.replay()
        expected = composed(arguments)
        assert (y.double() - expected).abs().max() <= 2**-9 * expected.abs().max()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interpret(sys.argv[1])))
