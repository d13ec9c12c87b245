"""Every engine computes what the plain form computes, whatever the images, and copied, pickled or scripted as well."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import AccelerationError
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines import ENGINES, Engine, LibraryConv2d, NativeConv2d, OneDnnConv2d
from fxprune.inference.kernels import native

FORMATS = (torch.channels_last, torch.contiguous_format)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BOUNDS: tuple[tuple[float | None, float | None], ...] = (
    (None, None),
    (0.0, None),
    (0.0, 0.8),
    (None, 0.5),
    (-0.3, None),
)
WIDTHS = (1, 3, 4, 8, 12, 16, 20, 32, 48)
KERNELS = ((1, 1), (3, 3), (1, 5), (2, 3), (5, 1))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make(
    generator: torch.Generator,
    groups: int = 2,
    kept: int = 3,
    width: int = 20,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    index: bool = True,
    order: bool = True,
    bias: bool = True,
    bounds: tuple[float | None, float | None] = (0.0, None),
    dtype: torch.dtype = torch.float32,
) -> FusedConv2d:
    conv = nn.Conv2d(groups * kept, groups * width, kernel, stride, padding, dilation, groups, bias).to(dtype)
    fused = FusedConv2d(conv, 7 if index else groups * kept)
    fused.weight.copy_(torch.randn(conv.weight.shape, generator=generator) / conv.weight[0].numel() ** 0.5)
    if index:
        fused.index = torch.randint(7, (groups * kept,), generator=generator)
    if order:
        fused.order = torch.randperm(groups * width, generator=generator)
    fused.minimum, fused.maximum = bounds
    return fused


def engines(conv: FusedConv2d) -> Iterator[Engine]:
    """Every engine that can compute `conv`, in every memory format."""
    for memory_format in FORMATS:
        for engine in ENGINES:
            if not engine.obstacle(conv, memory_format):
                yield engine(conv, memory_format)


def check(conv: FusedConv2d, x: Tensor, residual: Tensor | None = None) -> list[str]:
    """See that every engine agrees with the plain form in float64; return the names of the engines."""
    expected = conv.copy().double()(x.double(), None if residual is None else residual.double())
    names = []
    finite = expected[expected.isfinite()].abs()
    limit = TOLERANCES[x.dtype] * (max(1.0, float(finite.max())) if finite.numel() else 1.0)
    kept = x.clone(), None if residual is None else residual.clone()
    for engine in engines(conv):
        found = engine(x, residual)
        assert found.shape == expected.shape
        assert found.dtype == x.dtype
        if engine.name == "onednn":  # its own activations, which TorchInductor calls too, make NaN and infinity finite
            found = found.double().where(expected.isfinite(), expected)
        torch.testing.assert_close(
            found.double(), expected, rtol=0, atol=limit, equal_nan=True, msg=f"{engine.name} differs"
        )
        assert torch.equal(x.nan_to_num(), kept[0].nan_to_num()), f"{engine.name} writes into its input"
        if residual is not None and kept[1] is not None:
            assert torch.equal(residual.nan_to_num(), kept[1].nan_to_num()), f"{engine.name} writes into its residual"
        names.append(engine.name)
    return names


def shape_of(conv: FusedConv2d, x: Tensor) -> torch.Size:
    y: Tensor = conv.copy().to("meta")(x.to("meta"))
    return y.shape


def choose(generator: torch.Generator, options: Any) -> Any:
    return options[int(torch.randint(len(options), (), generator=generator))]


@pytest.mark.parametrize("seed", range(36))
def test_random_convolutions(seed: int, threads: None) -> None:
    seed = 2 * seed + torch.get_num_threads()
    g = torch.Generator().manual_seed(seed)
    kernel = choose(g, KERNELS)
    conv = make(
        g,
        groups=choose(g, (1, 2, 3, 4)),
        kept=choose(g, (1, 2, 5, 8)),
        width=WIDTHS[seed % len(WIDTHS)],
        kernel=kernel,
        stride=(choose(g, (1, 2, 3)), choose(g, (1, 2))),
        padding=(choose(g, (0, 1, 4)), choose(g, (0, 1, 2, 5))),
        dilation=(choose(g, (1, 2)), choose(g, (1, 3))),
        index=choose(g, (True, False)),
        order=choose(g, (True, False)),
        bias=choose(g, (True, False)),
        bounds=choose(g, BOUNDS),
    )
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, conv.padding, conv.dilation, strict=True)]
    size = [n + choose(g, (0, 1, 5, 12)) for n in least]
    x = torch.randn(choose(g, (0, 1, 2, 5)), conv.channels, *size, generator=g)
    residual = torch.randn(shape_of(conv, x), generator=g) if choose(g, (True, False)) else None
    formats = [choose(g, FORMATS), choose(g, FORMATS)]
    x = x.contiguous(memory_format=formats[0])
    residual = None if residual is None else residual.contiguous(memory_format=formats[1])
    names = check(conv, x, residual)
    assert {"library", "onednn"} <= set(names)
    assert native.obstacle() or conv.groups == conv.channels > 1 or names.count("native") == len(FORMATS)


def depthwise(g: torch.Generator, channels: int, kernel: int, stride: int, dilation: int) -> FusedConv2d:
    padding = choose(g, (0, 1, kernel // 2 * dilation))
    conv = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, channels, bias=choose(g, (True, False)))
    fused = FusedConv2d(conv, channels)
    fused.minimum, fused.maximum = choose(g, BOUNDS)
    return fused


@pytest.mark.parametrize("channels", [3, 7, 8, 19, 40])
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 1, 1), (3, 2, 1), (3, 1, 2), (5, 3, 1)])
def test_depthwise_convolutions(channels: int, kernel: int, stride: int, dilation: int, threads: None) -> None:
    g = torch.Generator().manual_seed(channels * kernel)
    conv = depthwise(g, channels, kernel, stride, dilation)
    for height, width in ((kernel * dilation, kernel * dilation + 4), (21, 40)):
        x = torch.randn(2, channels, height, width, generator=g)
        names = check(conv, x, torch.randn(shape_of(conv, x), generator=g))
        assert native.obstacle() or names.count("depthwise") == 1


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("channels", [512, 1024])
def test_pixels_that_share_sets_of_the_cache(kernel: int, stride: int, channels: int, threads: None) -> None:
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, 40, kernel, stride, kernel // 2)
    fused = FusedConv2d(conv, channels)
    x = torch.randn(3, channels, 9, 21, generator=g)
    check(fused, x, torch.randn(shape_of(fused, x), generator=g))


@pytest.mark.parametrize("size", [(7, 7), (1, 13), (14, 14), (3, 20)])
def test_images_narrower_than_a_tile(size: tuple[int, int], threads: None) -> None:
    g = torch.Generator().manual_seed(0)
    for padding in ((1, 1), (2, 0), (0, 1)):
        conv = make(g, groups=2, kept=5, width=40, padding=padding, kernel=(1, 3))
        x = torch.randn(3, conv.channels, *size, generator=g)
        check(conv, x, torch.randn(shape_of(conv, x), generator=g))


def test_images_that_many_tasks_share(threads: None) -> None:
    g = torch.Generator().manual_seed(0)
    for padding, stride in (((0, 0), (1, 1)), ((2, 1), (2, 1)), ((5, 2), (1, 2))):  # (5, 2): rows of padding alone
        conv = make(g, groups=2, kept=8, width=40, stride=stride, padding=padding, index=False)
        x = torch.randn(3, 16, 3, 300, generator=g)
        check(conv, x, torch.randn(shape_of(conv, x), generator=g))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("order", [True, False])
def test_nan_and_infinity_propagate(value: float, bounds: tuple[float | None, float | None], order: bool) -> None:
    g = torch.Generator().manual_seed(0)
    conv = make(g, bounds=bounds, order=order, padding=(0, 0))
    x = torch.randn(2, 7, 6, 9, generator=g)
    x[1, int(conv.reads()[0, 0]), 2, 4] = value
    check(conv, x)
    residual = torch.randn(shape_of(conv, x), generator=g)
    residual[0, 3, 1, 2] = value
    check(conv, x, residual)


@pytest.mark.parametrize("order", [True, False])
def test_tensors_that_are_not_contiguous(order: bool) -> None:
    g = torch.Generator().manual_seed(0)
    conv = make(g, order=order)
    x = torch.randn(4, 14, 11, 9, generator=g)
    residual = torch.randn(2, 80, 4, 11, generator=g)
    check(conv, x[::2, ::2, :, 1:5], residual[:, ::2].transpose(2, 3))
    check(conv, x[:1, :7].expand(3, -1, -1, -1), residual[:1, :40, :1, :1].expand(3, 40, 11, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [True, False])
def test_other_types(dtype: torch.dtype, order: bool) -> None:
    g = torch.Generator().manual_seed(0)
    conv = make(g, dtype=dtype, order=order, bounds=(0.0, 0.8))
    x = torch.randn(2, 7, 6, 5, generator=g).to(dtype)
    names = check(conv, x, torch.randn(shape_of(conv, x), generator=g).to(dtype))
    assert "library" in names
    assert "native" not in names


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_with_a_residual_and_a_rectifier(groups: int) -> None:
    g = torch.Generator().manual_seed(0)
    conv = make(g, dtype=torch.bfloat16, groups=groups, bounds=(0.0, None), order=False)
    x = torch.randn(2, 7, 6, 5, generator=g).bfloat16()
    names = check(conv, x, torch.randn(shape_of(conv, x), generator=g).bfloat16())
    assert ("onednn" in names) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_bounds_in_the_wrong_order_are_torchs() -> None:
    conv = make(torch.Generator().manual_seed(0), bounds=(1.0, -1.0))
    check(conv, torch.randn(2, 7, 6, 5))


def test_what_an_engine_cannot_do_it_says() -> None:
    g = torch.Generator().manual_seed(0)
    half, depthwise = make(g, dtype=torch.float16), make(g, groups=6, kept=1, index=False)
    depthwise.channels = 6
    assert "no packed form for torch.float16" in OneDnnConv2d.obstacle(half, torch.channels_last)
    assert "for float32 on the CPU, not torch.float16 on cpu" in NativeConv2d.obstacle(half, torch.channels_last)
    assert "a group" in NativeConv2d.obstacle(depthwise, torch.channels_last)
    for engine in ENGINES:
        on_meta = engine.obstacle(make(g).to("meta"), torch.channels_last)
        assert bool(on_meta) == (engine is not LibraryConv2d)


@pytest.mark.parametrize("broken", ["places", "index", "bias"])
def test_control_a_wrong_table_is_seen(broken: str) -> None:
    if native.obstacle():
        pytest.skip(native.obstacle())
    g = torch.Generator().manual_seed(0)
    conv, x = make(g), torch.randn(2, 7, 6, 5, generator=g)
    engine = NativeConv2d(conv, torch.channels_last)
    torch.testing.assert_close(engine(x), conv(x), rtol=0, atol=1e-5)
    table = engine.get_buffer(broken)
    table.copy_(table.flip(-1))
    with pytest.raises(AssertionError, match=r"not close"):
        torch.testing.assert_close(engine(x), conv(x), rtol=0, atol=1e-5)


# --- copied, moved, exported ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """An engine with a fixed call, as a model would make it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.engine(x, residual)
        z: Tensor = self.engine(x)
        return y + z


def layers(**options: Any) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    conv = make(g, **options)
    x = torch.randn(2, 7, 6, 5, generator=g).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(shape_of(conv, x), generator=g).contiguous(memory_format=torch.channels_last)
    for engine in engines(conv):
        yield Layer(engine).eval(), x, residual


VARIANTS = pytest.mark.parametrize(
    "options",
    [{"bounds": (0.0, 0.8)}, {"order": False}, {"order": False, "index": False, "groups": 1, "kept": 7}],
    ids=str,
)


@VARIANTS
def test_copies_compute_the_same(options: dict[str, Any]) -> None:
    for layer, x, residual in layers(**options):
        expected = layer(x, residual)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(copy.deepcopy(layer))):
            assert torch.equal(other(x, residual), expected)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x, residual), expected)


@VARIANTS
def test_they_script(options: dict[str, Any]) -> None:
    for layer, x, residual in layers(**options):
        scripted = torch.jit.script(layer)
        for _ in range(3):  # the second and third call run what the first one has been optimised to
            assert torch.equal(scripted(x, residual), layer(x, residual))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_they_compile_and_export() -> None:
    for layer, x, residual in layers(order=False):
        torch._dynamo.reset()
        expected = layer(x, residual)
        is_open = layer.engine.name != "onednn"  # torch has no fake form of all its operators, nor of a packed weight
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=is_open)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, residual), expected, rtol=0, atol=1e-5)
        if is_open:
            exported = torch.export.export(layer, (x, residual)).module()
            torch.testing.assert_close(exported(x, residual), expected, rtol=0, atol=1e-5)


def test_a_fresh_process_without_triton_unpickles_them(tmp_path: Path) -> None:
    made = list(layers(order=False))
    torch.save([(layer, x, residual, layer(x, residual)) for layer, x, residual in made], tmp_path / "layers.pt")
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from fxprune.inference.kernels import gather_conv2d\n"
        "assert gather_conv2d(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), None, torch.arange(2)).item() == 2\n"
        "for layer, x, residual, expected in torch.load(sys.argv[1], weights_only=False):\n"
        "    assert torch.equal(layer(x, residual), expected)\n"
        "    print(layer.engine.name)\n"
    )
    sys_path = [str(Path(__file__).parent)]  # where the class `Layer` is
    program = f"import sys; sys.path[:0] = {sys_path}\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "layers.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [layer.engine.name for layer, _, _ in made]


def test_they_refuse_to_move() -> None:
    for layer, x, residual in layers():
        expected = layer(x, residual)
        for target in ("meta", torch.float64, torch.float16, torch.bfloat16):
            with pytest.raises(AccelerationError, match=r"accelerated for torch.float32 on cpu, and cannot become"):
                layer.to(target)
        for stay in (layer.to("cpu"), layer.eval(), layer.cpu(), layer.float(), layer.requires_grad_(False)):
            assert torch.equal(stay(x, residual), expected)
