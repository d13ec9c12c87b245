"""The folder of built kernels and measured times: for its owner alone; nothing is loaded that others could write."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import KernelError
from fxprune.inference.cache import cache_directory, distrust, make_cache_directory
from fxprune.inference.kernels import native
from fxprune.inference.stopwatch import Stopwatch

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache will be, with a compiler that writes a few bytes, under a mask that lets a group write."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    monkeypatch.setattr(native, "obstacle", native.obstacle.__wrapped__)
    return tmp_path / "cache"


@pytest.fixture
def loose_mask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_it_is_made_for_its_owner_alone(folder: Path, loose_mask: None) -> None:
    assert not folder.exists()
    library = native.build()
    assert library.parent == folder == cache_directory()
    assert mode(folder) == 0o700
    assert mode(library) == 0o700
    assert native.build() == library


def test_times_make_it_so_too(folder: Path, loose_mask: None) -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch.race({"nothing": lambda: None})
    stopwatch.save()
    assert mode(folder) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    assert native.build().parent == folder, "and what was made by times serves the kernel"


@pytest.mark.parametrize("loose", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_not_used(folder: Path, loose: int) -> None:
    library = native.build()
    folder.chmod(loose)
    with pytest.raises(
        KernelError, match=rf"is not loaded: others may write .*cache \(mode {loose:o}\); remove it, or"
    ):
        native.build()
    folder.chmod(0o755)  # control: that others may read it does no harm
    assert native.build() == library


def test_a_library_that_others_may_write_is_not_loaded(folder: Path) -> None:
    library = native.build()
    library.chmod(0o722)
    with pytest.raises(KernelError, match=rf"others may write .*{library.name} \(mode 722\)"):
        native.build()
    library.chmod(0o755)
    assert native.build() == library


@pytest.mark.parametrize("what", ["folder", "library", "link"])
def test_what_belongs_to_somebody_else_is_not_loaded(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.build()
    theirs = {"folder": folder, "library": library, "link": library}[what]
    if what == "link":  # a link of one's own to what is another's
        theirs = library.rename(folder.parent / "theirs.so")
        library.symlink_to(theirs)
    right = Path.stat

    def strange(path: Path, **options: bool) -> os.stat_result:
        about = right(path, **options)
        if not os.path.samefile(path, theirs):
            return about
        return os.stat_result((*about[:4], os.getuid() + 1, *about[5:10]))

    monkeypatch.setattr(Path, "stat", strange)
    assert f"belongs to another user (uid {os.getuid() + 1})" in distrust(theirs)
    with pytest.raises(KernelError, match=r"belongs to another user .*; remove it, or set FXPRUNE_CACHE to a folder"):
        native.build()


def test_the_report_says_why(folder: Path) -> None:
    make_cache_directory().chmod(0o777)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    report = fxprune.acceleration_report(fxprune.accelerate(net, torch.randn(1, 3, 8, 8)))
    (reason,) = {layer.obstacles["native"] for layer in report.layers}
    assert "others may write" in reason
    assert "native" not in {form.split()[1] for layer in report.layers for form in layer.seconds}


def test_where_there_are_no_owners_nothing_is_distrusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache_directory().chmod(0o777)
    assert distrust(folder)
    monkeypatch.delattr(os, "getuid")
    assert distrust(folder) == ""
