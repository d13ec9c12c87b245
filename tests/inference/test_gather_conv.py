"""The fused convolution as an operator: values, gradients, layouts, what torch asks of operators, and bad input."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products_harness import fewer
from torch import Tensor, nn
from torch.testing._internal.optests.generate_tests import OpCheckError

from fxprune.errors import FxpruneError, KernelError
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines import TritonConv2d
from fxprune.inference.kernels import gather_conv, gather_conv2d, triton_conv
from fxprune.inference.kernels.gather_conv import BLOCKS, aligned_block, obstacle, pack

operator = torch.ops.fxprune.gather_conv2d.default


def arguments(
    block: int = 1,
    groups: int = 2,
    bias: bool = True,
    ordered: bool = False,
    residual: bool = True,
    clamp: tuple[float | None, float | None] = (0.0, 1.0),
    stride: tuple[int, int] = (2, 1),
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Of a 3x2 kernel whose two axes have nothing in common; channels are read twice and left out."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    kept = 2 * block
    index = torch.cat([torch.tensor([g + 2, g + 1])[:, None] * block + torch.arange(block) for g in range(groups)])
    found: dict[str, Any] = {
        "x": normal(batch, (groups + 3) * block, 5, 6),
        "weight": normal(3 * groups, kept, 3, 2),
        "bias": normal(3 * groups) if bias else None,
        "index": index.flatten(),
        "places": None if ordered else torch.randperm(3 * groups, generator=torch.Generator().manual_seed(1)),
        "residual": None,
        "stride": stride,
        "padding": (2, 0),
        "dilation": (1, 2),
        "groups": groups,
        "block": block,
        "minimum": clamp[0],
        "maximum": clamp[1],
    }
    if residual:
        found["residual"] = normal(batch, 3 * groups, (5 + 4 - 3) // stride[0] + 1, (6 - 3) // stride[1] + 1)
    return found


def by_hand(a: dict[str, Any]) -> Tensor:
    """Each group a convolution of its own over the channels it reads, one after the other."""
    outputs = []
    for group in range(a["groups"]):
        filters = slice(group * 3, group * 3 + 3)
        kept = a["weight"].shape[1]
        read = [a["x"][:, int(c)] for c in a["index"][group * kept : (group + 1) * kept]]
        bias = None if a["bias"] is None else a["bias"][filters]
        outputs.append(
            F.conv2d(torch.stack(read, 1), a["weight"][filters], bias, a["stride"], a["padding"], a["dilation"])
        )
    y = torch.cat(outputs, 1)
    if a["places"] is not None:
        y = torch.stack([y[:, a["places"].tolist().index(channel)] for channel in range(y.shape[1])], 1)
    if a["residual"] is not None:
        y = y + a["residual"]
    if a["minimum"] is not None:
        y = torch.where(y < a["minimum"], a["minimum"], y)
    if a["maximum"] is not None:
        y = torch.where(y > a["maximum"], a["maximum"], y)
    return y


CASES = [
    arguments(),
    arguments(block=8),
    arguments(groups=1, bias=False),
    arguments(residual=False, clamp=(None, None)),
    arguments(clamp=(0.0, None), stride=(1, 1), ordered=True),
    arguments(ordered=True),
    arguments(bias=False, residual=False, clamp=(None, 0.5)),
]


def with_gradients(a: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in a.items()
    }


def close(actual: Tensor, expected: Tensor, relative: float = 1e-12) -> bool:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()) <= relative * float(expected.abs().max())


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(CASES)))
def test_it_is_a_convolution_for_each_group(number: int) -> None:
    a = CASES[number]
    expected = by_hand(a)
    assert close(gather_conv2d(**a), expected)
    smaller = {name: a[name].int() for name in ("index", "places") if a[name] is not None}
    assert close(gather_conv2d(**a | smaller), expected)
    other = a["index"].roll(a["block"])
    assert not close(gather_conv2d(**a | {"index": other}), expected)  # the comparison is not blind


@pytest.mark.parametrize(
    "name, other", [("bias", None), ("places", None), ("residual", None), ("minimum", None), ("maximum", 0.9)]
)
def test_control_every_argument_counts(name: str, other: float | None) -> None:
    a = arguments()
    assert not close(gather_conv2d(**a | {name: other}), by_hand(a))


def test_places_are_the_inverse_of_an_order() -> None:
    a = arguments(residual=False)
    order = a["places"].argsort()
    assert not torch.equal(order, a["places"])  # no involution, which would hide the difference
    expected = gather_conv2d(**a | {"places": None}).index_select(1, order)
    assert torch.equal(gather_conv2d(**a), expected)
    assert not close(gather_conv2d(**a | {"places": order}), expected)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with holes": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_goes_in_and_channels_last_comes_out(layout: str) -> None:
    a = arguments()
    changed = a | {name: LAYOUTS[layout](a[name]) for name in ("x", "weight", "residual")}
    y = gather_conv2d(**changed)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert close(y, by_hand(a))


def test_an_empty_batch() -> None:
    a = arguments(batch=0)
    assert gather_conv2d(**a).shape == by_hand(a).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packing_changes_the_layout_alone(dtype: torch.dtype) -> None:
    a = arguments(dtype=dtype)
    packed = pack(a["weight"])
    assert torch.equal(packed, a["weight"])
    # whatever is innermost, then the other, then the taps
    assert packed.permute(2, 3, *((0, 1) if dtype == torch.float32 else (1, 0))).is_contiguous()
    assert close(gather_conv2d(**a | {"weight": packed}).double(), by_hand(a).double(), relative=0.05)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_the_aligned_block_is_found(block: int) -> None:
    index = torch.cat([torch.arange(block) + start * block for start in (3, 1, 6, 2)])
    assert aligned_block(index, 2 * block) == aligned_block(index.int(), 2 * block) == block
    assert aligned_block(index.roll(1), 2 * block) == 1
    assert aligned_block(index + 1, 2 * block) == 1  # runs that start between two multiples
    if block >= 16:  # a run that reaches into the next group
        assert aligned_block(index, block // 2) == block // 2


def test_the_whole_space_in_order_is_one_run() -> None:
    assert aligned_block(torch.arange(128), 128) == 64
    assert aligned_block(torch.arange(24), 24) == 8
    assert aligned_block(torch.arange(20), 20) == 1


def test_a_wrong_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments(block=8)
    shifted = a | {"index": a["index"] + 1}
    with pytest.raises(KernelError, match=r"not made of aligned runs of 8 channels; its block is 1"):
        gather_conv2d(**shifted)
    assert close(gather_conv2d(**shifted | {"block": 1}), by_hand(shifted))
    monkeypatch.setattr(gather_conv, "aligned_block", lambda *_: 64)
    gather_conv2d(**shifted)  # it was the check that refused


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(compute: Callable[..., Tensor], a: dict[str, Any]) -> dict[str, Tensor]:
    y = compute(a)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    inputs = {name: value for name, value in a.items() if isinstance(value, Tensor) and value.requires_grad}
    return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), direction), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_gradients(number: int) -> None:
    a = with_gradients(CASES[number])
    expected = gradients(by_hand, a)
    assert expected.keys() >= {"x", "weight"}
    for name, gradient in gradients(lambda a: gather_conv2d(**a), a).items():
        assert close(gradient, expected[name]), name


def test_gradients_of_gradients() -> None:
    a = with_gradients(arguments(residual=False, clamp=(0.0, None), batch=1))

    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gather_conv2d(**a | {"x": x[:, :, :3, :4], "weight": weight, "bias": bias})

    inputs = (a["x"], a["weight"], a["bias"])
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@pytest.mark.parametrize("trained", ["x", "weight", "bias", "residual"])
def test_one_tensor_may_be_trained_alone(trained: str) -> None:
    a = arguments()
    expected = gradients(by_hand, with_gradients(a))[trained]
    a[trained].requires_grad_()
    assert close(gradients(lambda a: gather_conv2d(**a), a)[trained], expected)


@pytest.mark.parametrize("maximum, activation", [(None, nn.ReLU()), (6.0, nn.ReLU6())], ids=["relu", "relu6"])
def test_the_gradient_at_a_bound_is_that_of_the_activation(maximum: float | None, activation: nn.Module) -> None:
    one = torch.ones(1, 1, 1, 1)
    for value in (-1.0, 0.0, 1.0, 6.0, 7.0):
        x, same = (torch.full((1, 1, 1, 1), value, requires_grad=True) for _ in range(2))
        gather_conv2d(x, one, None, torch.tensor([0]), minimum=0.0, maximum=maximum).backward()  # type: ignore[no-untyped-call]
        activation(same).backward()
        assert x.grad is not None
        assert x.grad == same.grad


def test_control_places_that_are_forgotten_in_the_gradient_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    a = with_gradients(arguments())
    expected = gradients(by_hand, a)["weight"]
    y = gather_conv2d(**a)
    sound = gather_conv._gather
    monkeypatch.setattr(gather_conv, "_gather", lambda x, i: x if torch.equal(i, a["places"]) else sound(x, i))
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    assert not close(torch.autograd.grad(y, a["weight"], direction)[0], expected)


def test_control_a_wrong_gather_in_the_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    a = with_gradients(arguments())
    expected = gradients(by_hand, a)["weight"]
    y = gather_conv2d(**a)
    sound = gather_conv._gather
    monkeypatch.setattr(gather_conv, "_gather", lambda x, index: sound(x, index.roll(1)))
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    assert not close(torch.autograd.grad(y, a["weight"], direction)[0], expected)


# --- what torch asks of an operator -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the check itself
@pytest.mark.parametrize("number", fewer([0, 3], [3]))
def test_torch_accepts_the_operator(number: int) -> None:
    """Its schema, its fake kernel (shapes, strides), its gradient, and all of it with symbolic sizes."""
    checks = torch.library.opcheck(operator, tuple(with_gradients(CASES[number]).values()))
    assert len(checks) >= 4
    assert set(checks.values()) == {"SUCCESS"}


def test_control_a_wrong_fake_kernel_is_seen() -> None:
    with torch.library._scoped_library("fxprune_test", "DEF") as library:
        library.define("wrong(Tensor x, Tensor w) -> Tensor")
        library.impl("wrong", lambda x, w: gather_conv2d(x, w, None, torch.arange(4)), "CPU")
        torch.library.register_fake("fxprune_test::wrong", lambda x, w: torch.empty_like(x), lib=library)
        inputs = (torch.randn(2, 4, 5, 5), torch.randn(4, 4, 1, 1))  # contiguous, and so is the fake output
        with pytest.raises(OpCheckError, match="test_faketensor"):
            torch.library.opcheck(torch.ops.fxprune_test.wrong.default, inputs, test_utils="test_faketensor")


class Net(nn.Module):
    """The operator between two others."""

    index: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        a = arguments(block=8, residual=False, dtype=torch.float32)
        self.weight, self.bias = nn.Parameter(a["weight"]), nn.Parameter(a["bias"])
        self.register_buffer("index", a["index"])
        self.register_buffer("places", a["places"])

    def forward(self, x: Tensor) -> Tensor:
        y = gather_conv2d(
            x * 2, self.weight, self.bias, self.index, self.places, padding=(1, 1), groups=2, block=8, minimum=0.0
        )
        return y + 1


def test_torch_compile_sees_one_graph() -> None:
    net, x = Net(), torch.randn(2, 40, 6, 7)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        assert torch.equal(compiled(x[:1].expand(batch, -1, -1, -1)), net(x[:1].expand(batch, -1, -1, -1)))
    expected, found = (
        torch.autograd.grad(forward(x).sum(), [net.weight, net.bias], allow_unused=False) for forward in (net, compiled)
    )
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_torch_export_keeps_the_operator() -> None:
    net, x = Net().eval(), torch.randn(2, 40, 6, 7)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    assert [node.target for node in program.graph.nodes].count(operator) == 1
    larger = torch.randn(5, 40, 6, 7)
    assert torch.equal(program.module()(larger), net(larger))


def test_fx_traces_it() -> None:
    net, x = Net(), torch.randn(2, 40, 6, 7)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


# --- which kernel runs ------------------------------------------------------------------------------------------------


def test_why_a_device_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle("cpu") == "the Triton kernel is for CUDA devices, not for 'cpu'"
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(triton_conv, "triton", None)
    assert triton_conv.missing(cuda) == "Triton is not installed; `pip install triton`"
    monkeypatch.setattr(triton_conv, "triton", object())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in triton_conv.missing(cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert triton_conv.missing(cuda) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert triton_conv.missing(cuda) == ""


@pytest.mark.slow  # by default the fresh process of `test_engines` imports it without Triton
def test_importing_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from fxprune.inference.kernels import gather_conv2d;"
        "print(gather_conv2d(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), None, torch.arange(2)).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2.0", done.stderr


def handed_over(a: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the Triton kernel would be called with on a device that has it."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gather_conv, "_obstacle", lambda _: "")
    monkeypatch.setattr(triton_conv, "convolve", lambda *given: calls.append(given))
    gather_conv._cuda(**a)
    return calls


@pytest.mark.parametrize("dtype", triton_conv.DTYPES)
def test_the_kernel_gets_channels_last(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ((x, weight, bias, index, places, residual, out, *options),) = handed_over(arguments(dtype=dtype), monkeypatch)
    for image in (x, residual, out):
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.dtype == dtype
    assert (weight.shape, bias.shape, index.shape, places.shape) == ((6, 2, 3, 2), (6,), (4,), (6,))
    assert options == [(2, 1), (2, 0), (1, 2), 2, 1, 0.0, 1.0]


def test_the_kernel_gets_neither_float64_nor_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(handed_over(arguments(dtype=torch.float32), monkeypatch)) == 1
    assert handed_over(arguments(dtype=torch.float64), monkeypatch) == []
    assert handed_over(arguments(dtype=torch.float32, batch=0), monkeypatch) == []


def test_control_without_the_kernel_the_composition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments(dtype=torch.float32)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton_conv, "convolve", lambda *given: calls.append(given))
    assert close(gather_conv._cuda(**a), by_hand(a), relative=1e-5)
    assert calls == []


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_engine_is_the_fused_convolution(number: int) -> None:
    a = CASES[number]
    conv = nn.Conv2d(
        a["weight"].shape[1] * a["groups"], len(a["weight"]), (3, 2), a["stride"], (2, 0), (1, 2), a["groups"]
    )
    conv = conv.double()
    fused = FusedConv2d(conv, a["x"].shape[1])
    fused.index, fused.minimum, fused.maximum = a["index"], a["minimum"], a["maximum"]
    fused.order = None if a["places"] is None else a["places"].argsort()
    engine = TritonConv2d(fused, torch.channels_last)
    x, residual = a["x"].contiguous(memory_format=torch.channels_last), a["residual"]
    expected = fused(x, residual)
    assert engine.block == a["block"]
    assert close(engine(x, residual), expected)
    if fused.order is not None:
        engine.places = fused.order.argsort().roll(1)
        assert not close(engine(x, residual), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(5, 5, 6, dtype=torch.float64)}, r"shapes \(5, 5, 6\).*pass \(N, C, H, W\)"),
        ({"weight": torch.zeros(6, 2, 3, dtype=torch.float64)}, r"\(6, 2, 3\); pass"),
        ({"stride": (0, 1)}, r"stride \[0, 1\].*start at 1"),
        ({"dilation": (1, 0)}, r"dilation \[1, 0\].*start at 1"),
        ({"padding": (-1, 0)}, r"padding \[-1, 0\].*padding at 0"),
        ({"groups": 0}, r"groups 0.*start at 1"),
        ({"groups": 4}, r"\(6, 2, 3, 2\) in 4 groups; .* 6 filters must divide"),
        ({"weight": torch.zeros(6, 0, 3, 2, dtype=torch.float64)}, r"must not be empty"),
        ({"index": torch.arange(3)}, r"shape \(3,\); 2 groups of 2 channels need \(4,\)"),
        ({"index": torch.zeros(4)}, r"type torch.float32 .* int32 or int64"),
        ({"block": 2}, r"block is 2, .* keeps 2 channels; use a divisor of them among 1, 8, 16, 32, 64"),
        ({"block": 8}, r"block is 8, .* keeps 2 channels"),
        ({"x": torch.zeros(2, 5, 5, 2, dtype=torch.float64)}, r"5 x 2 is smaller than the kernel of 3 x 2 with dil"),
        ({"bias": torch.zeros(5, dtype=torch.float64)}, r"bias of shape \(5,\) for 6 filters"),
        ({"places": torch.arange(5)}, r"places have type torch.int64 and shape \(5,\); 6 filters need \(6,\)"),
        ({"places": torch.zeros(6)}, r"places have type torch.float32 .* int32 or int64"),
        ({"places": torch.zeros(6, dtype=torch.int64)}, r"places do not name each output channel once"),
        ({"places": torch.arange(1, 7)}, r"places do not name each output channel once"),
        ({"residual": torch.zeros(1, 6, 4, 4, dtype=torch.float64)}, r"residual of shape \(1, 6, .*\(2, 6, 4, 4\)"),
        ({"weight": torch.zeros(6, 2, 3, 2)}, r"weight is torch.float32, the input torch.float64; convert"),
        ({"index": torch.zeros(4, dtype=torch.int64, device="meta")}, r"index is on meta, the input on cpu; move"),
    ],
)  # fmt: skip
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    a = arguments() | changed
    with pytest.raises(KernelError, match=message):
        gather_conv2d(**a)
    gather_conv2d(**arguments())


def test_a_channel_that_is_not_there() -> None:
    a = arguments()
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|bound"):
        gather_conv2d(**a | {"index": a["index"] + 5})


def test_its_errors_are_of_the_family() -> None:
    assert issubclass(KernelError, FxpruneError)
