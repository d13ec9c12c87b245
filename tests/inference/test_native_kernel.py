"""The compiled kernel as a guest: built once, absent without harm, and deaf to wrong arguments."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import KernelError
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines import LibraryConv2d, NativeConv2d
from fxprune.inference.kernels import native

# A model is accelerated whatever happens to the kernel, and the report says what did.
PROGRAM = """
import torch, fxprune
torch.set_num_threads(1)
from fxprune.inference.kernels import native
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)).eval()
x = torch.randn(1, 3, 8, 8)
fast = fxprune.accelerate(net, x)
torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
report = fxprune.acceleration_report(fast)
print(report.layers[0].obstacles.get("native", "used"))
"""


def child(program: str = PROGRAM, **environment: str) -> str:
    """What a fresh process prints last."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of an earlier build in this process."""
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    monkeypatch.setattr(native, "obstacle", native.obstacle.__wrapped__)


@pytest.fixture
def fresh(forgetful: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty cache in it."""
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


@pytest.fixture
def fake_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a few bytes, and a line into a log for each call."""
    script, log = fresh / "compiler", fresh / "calls"
    script.write_text(f'#!/bin/sh\necho called >> {log}\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


NO_KERNEL = native.obstacle()
needs_kernel = pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)


# --- where there is none --------------------------------------------------------------------------------------------


def test_it_can_be_turned_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_NATIVE", "0")
    assert native.obstacle() == "FXPRUNE_NATIVE=0 turns the compiled kernel off"
    assert not (fresh / "cache").exists()


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "install g++ or clang++, or set CXX" in native.obstacle()


@pytest.mark.parametrize(
    "compiler, reason",
    [("/bin/false", "/bin/false cannot build the compiled kernel: no message"), ("no-such-compiler", "No such file")],
)
def test_with_a_compiler_that_fails(compiler: str, reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert reason in native.obstacle()
    assert not list((fresh / "cache").glob("*"))


def test_with_a_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "cache").write_text("a file, not a folder")
    assert "set CXX or FXPRUNE_CACHE" in native.obstacle()


def test_a_model_is_accelerated_with_what_is_no_library(fake_compiler: Path) -> None:
    assert "cannot be loaded" in child()


@needs_kernel
def test_a_kernel_that_is_wrong_is_not_used(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_test", lambda: float("nan"))
    assert "wrong by nan" in native.obstacle()
    with pytest.raises(KernelError, match=r"it is not used"):
        native.load()
    assert "it is not used" in NativeConv2d.obstacle(FusedConv2d(nn.Conv2d(4, 4, 1), 4), torch.channels_last)


@needs_kernel
def test_its_own_test_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._test() <= native.TOLERANCE
    right = native.pack

    def wrong(*arguments: Any) -> native.Packed:
        packed = right(*arguments)
        return packed._replace(weights=packed.weights.roll(1))

    monkeypatch.setattr(native, "pack", wrong)
    assert native._test() > native.TOLERANCE


# --- the cache ------------------------------------------------------------------------------------------------------


def test_it_is_built_once(fake_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.build()
    assert native.build() == first
    assert fake_compiler.read_text().splitlines() == ["called"]
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing is left of the build
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    assert native.build() != first
    assert fake_compiler.read_text().splitlines() == ["called"] * 2


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "a folder"])
def test_a_damaged_library_is_built_anew(damage: str, fake_compiler: Path) -> None:
    library = native.build()
    content = library.read_bytes()
    library.unlink()
    if damage == "a folder":
        library.mkdir()
        assert "cannot be built" in native.obstacle()
        return
    library.write_bytes({"truncated": content[:-3], "altered": b"L" + content[1:], "empty": b""}[damage])
    assert native.build().read_bytes() == content
    assert fake_compiler.read_text().splitlines() == ["called"] * 2


@needs_kernel
def test_half_a_library_is_not_loaded(tmp_path: Path) -> None:
    whole = native.build()
    half = tmp_path / whole.name
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert native._is_whole(whole)
    assert not native._is_whole(half)


def test_two_may_build_at_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fresh / "slow"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.3\necho library > "$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(native.build) for _ in range(2)]
        assert [future.result().read_text() for future in both] == ["library\n"] * 2
    assert [path.suffix for path in (fresh / "cache").iterdir()] == [".so"]


# --- wrong arguments ------------------------------------------------------------------------------------------------


def arguments() -> dict[str, Any]:
    """A 3x3 convolution of 4 to 6 channels in two groups, each reading three."""
    generator = torch.Generator().manual_seed(0)
    packed = native.pack(torch.randn(6, 3, 3, 3, generator=generator), torch.randn(6, generator=generator), 2)
    return {
        "input": torch.randn(2, 4, 5, 5, generator=generator),
        "weights": packed.weights,
        "bias": packed.bias,
        "panels": packed.panels,
        "index": torch.tensor([[0, 1, 3], [3, 2, 2]], dtype=torch.int32),
        "out": torch.tensor([5, 0, 1, 4, 2, 3], dtype=torch.int32),
        "residual": None,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "channels": 4,
        "minimum": 0.0,
        "maximum": None,
    }


def entry(table: Tensor, *place: int, value: int) -> Tensor:
    changed = table.clone()
    changed[place] = value
    return changed


if not NO_KERNEL:
    RIGHT = arguments()
    WRONG: dict[str, tuple[dict[str, Any], str]] = {
        "channels of the input": ({"input": torch.randn(2, 5, 5, 5)}, "reads 4 channels; the input has 5"),
        "type of the input": ({"input": RIGHT["input"].double()}, "float32"),
        "three dimensions": ({"input": RIGHT["input"][0]}, r"\(N, C, H, W\)"),
        "small image": ({"input": RIGHT["input"][:, :, :1, :2], "padding": [0, 0]}, "smaller than the kernel"),
        "shape of the residual": ({"residual": torch.randn(2, 6, 5, 4)}, "residual must be float32"),
        "type of the residual": ({"residual": torch.randn(2, 6, 5, 5).double()}, "residual must be float32"),
        "residual to broadcast": ({"residual": torch.randn(1, 6, 5, 5)}, "residual must be float32"),
        "index too high": ({"index": entry(RIGHT["index"], 1, 1, value=4)}, "outside of the 4 channels"),
        "index too low": ({"index": entry(RIGHT["index"], 0, 0, value=-1)}, "outside of the 4 channels"),
        "index of long": ({"index": RIGHT["index"].long()}, "Int"),
        "flat index": ({"index": RIGHT["index"].flatten()}, "must be"),
        "strided index": ({"index": RIGHT["index"].t().contiguous().t()}, "not contiguous"),
        "out too high": ({"out": entry(RIGHT["out"], 0, value=6)}, "outside of the 6 channels"),
        "too few filters": ({"out": torch.arange(5, dtype=torch.int32)}, "the panels have 6 filters"),
        "group": ({"panels": entry(RIGHT["panels"], 1, 0, value=2)}, "panel 1 does not fit"),
        "lanes": ({"panels": entry(RIGHT["panels"], 0, 3, value=5)}, "panel 0 does not fit"),
        "offset": ({"panels": entry(RIGHT["panels"], 1, 5, value=10**6)}, "panel 1 does not fit"),
        "weights": ({"weights": RIGHT["weights"][:-1]}, "panel 1 does not fit"),
        "bias": ({"bias": RIGHT["bias"][:-1]}, "panel 1 does not fit"),
        "panels": ({"panels": RIGHT["panels"][:, :6].contiguous()}, "must be"),
        "larger kernel": ({"kernel": [3, 4]}, "panel 1 does not fit"),
        "no stride": ({"stride": [0, 1]}, "no convolution or pooling has"),
        "negative padding": ({"padding": [1, -1]}, "no convolution or pooling has"),
        "a short list": ({"dilation": [1]}, "dilation"),
    }
else:
    WRONG = {}


def call(**changes: Any) -> Tensor:
    y: Tensor = torch.ops.fxprune_native.conv2d(*{**arguments(), **changes}.values())
    return y


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_errors(name: str) -> None:
    changes, message = WRONG[name]
    assert call().shape == (2, 6, 5, 5)
    with pytest.raises(RuntimeError, match=message):
        call(**changes)


@needs_kernel
def test_its_fake_form_gives_the_same_shape() -> None:
    for changes in ({}, {"stride": [2, 3], "padding": [0, 4], "dilation": [2, 1]}, {"input": torch.randn(0, 4, 7, 3)}):
        real = call(**changes)
        on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in {**arguments(), **changes}.items()}
        fake = torch.ops.fxprune_native.conv2d(*on_meta.values())
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@needs_kernel
def test_an_index_out_of_range_in_an_engine_is_an_error() -> None:
    conv = FusedConv2d(nn.Conv2d(4, 4, 1), 3)
    conv.index = torch.tensor([0, 1, 2, 3])
    with pytest.raises(RuntimeError, match=r"outside of the 3 channels"):
        NativeConv2d(conv, torch.channels_last)(torch.randn(1, 3, 2, 2))
    with pytest.raises((IndexError, RuntimeError)):  # by version of torch
        LibraryConv2d(conv, torch.contiguous_format)(torch.randn(1, 3, 2, 2))


# --- on other processors --------------------------------------------------------------------------------------------

SEVERAL = """
import torch
from fxprune.inference.engines import NativeConv2d
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.kernels import native
assert not native.obstacle(), native.obstacle()
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
for groups, width in ((1, 48), (2, 20), (4, 8), (8, 3)):
    for pixels in (5, 8, 16, 29):
        for kernel, stride in ((1, 1), (3, 1), (3, 2)):
            conv = torch.nn.Conv2d(6 * groups, groups * width, kernel, stride, kernel // 2, groups=groups)
            fused = FusedConv2d(conv, 12)
            fused.index = torch.cat([torch.randperm(12, generator=generator)[:6] for _ in range(groups)])
            fused.order = torch.randperm(groups * width, generator=generator)
            fused.minimum = 0.0
            x = torch.randn(2, 12, pixels, pixels, generator=generator)
            for memory_format in (torch.channels_last, torch.contiguous_format):
                found = NativeConv2d(fused, memory_format)(x)
                torch.testing.assert_close(found, fused(x), rtol=1e-4, atol=1e-4, check_stride=False)
print(int(torch.ops.fxprune_native.widest_lanes()))
"""


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are for x86")
@pytest.mark.parametrize("flags, lanes", [("-mno-avx512f", {"8", "4"}), ("-mno-avx512f -mno-avx", {"4"})])
def test_with_narrower_registers(flags: str, lanes: set[str], tmp_path: Path) -> None:
    compiler = f"{os.environ.get('CXX', 'g++')} {flags}"
    assert child(SEVERAL, CXX=compiler, FXPRUNE_CACHE=str(tmp_path)) in lanes
