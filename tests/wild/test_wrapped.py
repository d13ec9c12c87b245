"""Models in the wrappers of PyTorch: taken out of them, or refused in words that help."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equality import randomize
from torch import Tensor, nn
from wild_harness import AS_MODULE, assert_same, in_float64

import fxprune
from fxprune.exact.record import record_of
from fxprune.vocabulary import Granularity

pytestmark = [
    pytest.mark.wild,
    pytest.mark.usefixtures("strangers"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::fxprune.NothingRewrittenWarning"),
]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3)
        self.c = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        y: Tensor = self.c(self.b(x).relu())
        return y


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    return randomize(Small()).eval()


def in_process(model: nn.Module) -> nn.Module:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # not in its __all__
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


def dynamo(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def traced(model: nn.Module) -> object:
    return torch.jit.trace(model, X)  # type: ignore[no-untyped-call]  # torch's


UNWRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": in_process,
    "compiled": dynamo,
    "exported": lambda model: torch.export.export(model, (X,)).module(),
}
REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "jit.trace": (traced, r"TorchScript.*pass the model that it was made from"),
    "jit.script": (torch.jit.script, r"TorchScript.*pass the model that it was made from"),
    "ExportedProgram": (lambda model: torch.export.export(model, (X,)), r"ExportedProgram.*pass the model itself"),
}


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("wrapper", UNWRAPPED)
def test_unwrapped_or_refused(wrapper: str, granularity: Granularity) -> None:
    """What comes out equals the model inside, masked; a refusal names the wrapper and says what to pass instead."""
    model = small()
    wrapped = UNWRAPPED[wrapper](model)
    refusal = None
    try:
        pruned = fxprune.compile(wrapped, 0.5, example_inputs=X, granularity=granularity, **AS_MODULE)
    except fxprune.FxpruneError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(rf"{type(wrapped).__name__}|torch\.compile|torch\.export", refusal), refusal
        assert re.search(r"\bpass\b|\bcompile\b", refusal), refusal
        return
    masked = fxprune.mask(model, record_of(pruned).plan)
    assert_same(in_float64(pruned, X), in_float64(masked, X))
    assert sum(p.numel() for p in pruned.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_words_that_help(kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(fxprune.FxpruneError) as refusal:
        fxprune.compile(make(small()), 0.5, example_inputs=X, **AS_MODULE)  # type: ignore[arg-type]  # on purpose
    assert re.search(words, str(refusal.value), re.DOTALL), refusal.value
