"""FXPRUNE_ISA: an AVX-512 machine as an AVX2 one."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import KernelError
from fxprune.inference.instructions import forced_isa
from fxprune.inference.kernels import native
from fxprune.inference.runtimes import OTHERS

NO_KERNEL = native.obstacle()
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86")

PROGRAM = """
import torch, fxprune
from fxprune.environment import environment
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)).eval()
x = torch.randn(1, 3, 8, 8)
fast = fxprune.accelerate(net, x, remember=False)
torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
assert "native" not in fxprune.acceleration_report(fast).layers[0].obstacles
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.engines import NativeConv2d, NativeDepthwiseConv2d
for size in ((7, 7), (14, 14), (3, 20), (30, 30)):  # tiles that go across rows, and such that do not
    conv = FusedConv2d(torch.nn.Conv2d(8, 40, 3, padding=1), 8)
    x, residual = torch.randn(3, 8, *size), torch.randn(3, 40, *size)
    found = NativeConv2d(conv, torch.channels_last)(x, residual)
    torch.testing.assert_close(found, conv(x, residual), rtol=0, atol=1e-5)
    conv = FusedConv2d(torch.nn.Conv2d(19, 19, 3, padding=1, groups=19), 19)
    x = torch.randn(3, 19, *size)
    found = NativeDepthwiseConv2d(conv, torch.channels_last)(x)
    torch.testing.assert_close(found, conv(x), rtol=0, atol=1e-5)
print(int(torch.ops.fxprune_native.widest_lanes()), environment()["instructions"])
"""


@on_x86
@pytest.mark.slow
@pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)
def test_what_runs_stays_within() -> None:
    said = []
    for isa in ("avx2", ""):
        environment = {**os.environ, "FXPRUNE_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said[0] in (["8", "AVX2"], ["4", "DEFAULT"])
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert said[1] == ["16", "AVX512"], "control: without it everything is used"


@on_x86
def test_kernels_and_times_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nwhile [ "$1" != -o ]; do shift; done\necho lib > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FXPRUNE_ISA", raising=False)
    names, libraries = [native.processor()], [native.build()]
    assert "-mno-avx512f" not in (tmp_path / "asked").read_text()
    monkeypatch.setenv("FXPRUNE_ISA", "avx2")
    names.append(native.processor())
    libraries.append(native.build())
    assert "-march=native -mno-avx512f" in (tmp_path / "asked").read_text().replace(
        " -fPIC -shared -std=c++20 -fopenmp", ""
    )
    assert names[1] == f"{names[0]}-avx2"
    assert libraries[0] != libraries[1]


@on_x86
def test_runtimes_that_cannot_be_kept_within_do_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_ISA", "avx2")
    for name in ("onnxruntime", "openvino"):
        reason = OTHERS[name].obstacle(torch.device("cpu"), torch.float32)
        assert reason == "fxprune cannot keep it within FXPRUNE_ISA=avx2; unset that"


def test_values_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_ISA", "sse9")
    with pytest.raises(KernelError, match=r"FXPRUNE_ISA is 'sse9'; it must be 'avx2', or unset"):
        fxprune.accelerate(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))
    monkeypatch.setenv("FXPRUNE_ISA", "avx2")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(KernelError, match=r"FXPRUNE_ISA is 'avx2', and this processor is aarch64; unset it"):
        forced_isa()
    monkeypatch.setenv("FXPRUNE_ISA", "")
    assert forced_isa() == ""
