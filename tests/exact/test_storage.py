"""save and load: the same model comes back, and nothing else is taken for one."""

import copy
import dataclasses
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import randomize
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError, StorageError
from fxprune.exact import storage
from fxprune.graph.layers import ChannelGather
from fxprune.vocabulary import Output

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.norm(self.first(x)).relu())
        return y


def compiled(net: nn.Module | None = None, **options: Any) -> torch.fx.GraphModule:
    return fxprune.compile(randomize(net or Net()).eval(), example_inputs=X, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    fxprune.save(compiled(), path)
    return path


def refused(path: Path, message: str, net: nn.Module | None = None) -> None:
    """See that loading raises, names the file, and leaves the model and the file as they are."""
    model = net or Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    content = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StorageError, match=message) as caught:
        fxprune.load(path, model)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not path.is_file() or path.read_bytes() == content


def altered(path: Path, change: Callable[[dict[str, Any]], None], digest: bool = True) -> None:
    """Change the content of a saved file, and make its checksum right again as a forger would."""
    content = torch.load(path, weights_only=True)
    change(content)
    if digest:
        content["digest"] = storage._digest(content["header"], content["state"])
    torch.save(content, path)


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["graph", "module"])
def test_what_was_measured_comes_back(output: Output, tmp_path: Path) -> None:
    images = torch.randn(24, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    pruned = fxprune.compile(
        randomize(Net()).eval(), ratio=0.25, granularity="filter", calibration=images, output=output
    )
    fxprune.save(pruned, tmp_path / "net.pt")
    report = fxprune.report(fxprune.load(tmp_path / "net.pt", Net()))
    assert report.agreement == fxprune.report(pruned).agreement is not None
    assert [layer.error for layer in report.layers] == [layer.error for layer in fxprune.report(pruned).layers]
    assert any(layer.error for layer in report.layers)
    assert f"note: {report.agreement}" in str(report)


@pytest.mark.parametrize(
    "options", [{}, {"form": "overlap"}, {"fold_batch_norm": True}, {"ratio": 0.75}], ids=lambda o: str(o)
)
def test_round_trip(tmp_path: Path, options: dict[str, Any]) -> None:
    pruned = compiled(**options)
    fxprune.save(pruned, tmp_path / "model.pt")
    fresh = Net().eval()
    loaded = fxprune.load(tmp_path / "model.pt", fresh)
    assert torch.equal(loaded(X), pruned(X))
    ours, theirs = loaded.state_dict(), pruned.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(isinstance(module, ChannelGather) for module in loaded.modules())
    assert loaded.code == pruned.code
    assert str(fxprune.report(loaded)) == str(fxprune.report(pruned))
    assert not torch.equal(fresh(X), pruned(X)), "the control needs a fresh model with other weights"


FILTERS: dict[str, dict[str, Any]] = {
    "filters": {"granularity": "filter", "ratio": 0.25},
    "a budget": {"granularity": "filter", "macs": 0.5, "scope": "global", "variety": "soft", "round_to": 4},
    "both": {"granularity": {"filter": 0.25, "kernel": 0.5}},
    "folded": {"granularity": "filter", "fold_batch_norm": True},
}


@pytest.mark.parametrize("name", FILTERS)
def test_round_trip_of_filters(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    pruned = compiled(**FILTERS[name])
    assert pruned.get_parameter("first.weight").shape[0] < 32
    fxprune.save(pruned, path)
    fresh = Net().eval()
    nn.init.constant_(fresh.first.weight, float("nan"))
    loaded = fxprune.load(path, fresh)
    assert torch.equal(loaded(X), pruned(X))
    assert loaded.meta["fxprune"].plan == pruned.meta["fxprune"].plan
    assert fxprune.report(loaded) == fxprune.report(pruned)
    assert loaded.code == pruned.code
    altered(path, lambda content: content["state"].update({"second.weight": torch.zeros(16, 32, 1, 1)}))
    refused(path, "does not fit Net: second.weight differs")


def test_refitted_filters_are_saved(tmp_path: Path) -> None:
    data = torch.randn(16, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    plain, pruned = compiled(granularity="filter"), compiled(granularity="filter", calibration=data)
    fxprune.save(pruned, tmp_path / "model.pt")
    loaded = fxprune.load(tmp_path / "model.pt", Net().eval())
    assert torch.equal(loaded(X), pruned(X))
    assert not torch.allclose(loaded(X), plain(X))


@pytest.mark.slow
def test_filters_in_a_form_for_one_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FxpruneError, match="accelerated: its weights are packed for one device"):
        fxprune.save(fxprune.accelerate(compiled(granularity="filter"), X), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_filters_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    fxprune.save(compiled(granularity="filter"), path)
    refused(
        path,
        "does not fit Sequential: .*; load it with the model it was compiled from$",
        nn.Sequential(nn.Conv2d(16, 32, 3)),
    )
    refused(path, "does not fit Net: ", Net(64))


def test_a_plan_of_filters_as_data() -> None:
    for options in FILTERS.values():
        plan = compiled(**options).meta["fxprune"].plan
        for other in (
            copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), fxprune.PrunePlan.from_json(plan.to_json())
        ):  # fmt: skip
            assert other == plan
            assert other.removed == plan.removed != {}


def test_plans_of_earlier_versions_remove_no_filters() -> None:
    plan = compiled().meta["fxprune"].plan
    data = json.loads(plan.to_json())
    assert data.pop("removed") == {}
    assert fxprune.PrunePlan.from_json(json.dumps(data)) == plan


def test_a_loaded_model_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.pt"
    fxprune.save(fxprune.load(saved, Net()), again)
    assert torch.equal(fxprune.load(again, Net().eval())(X), fxprune.load(saved, Net().eval())(X))


def test_the_weights_of_the_fresh_model_do_not_matter(saved: Path) -> None:
    fresh = Net()
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, float("nan"))
    assert torch.equal(fxprune.load(saved, fresh.eval())(X), fxprune.load(saved, Net().eval())(X))


def test_weights_that_were_trained_further_are_saved(tmp_path: Path) -> None:
    pruned = compiled()
    with torch.no_grad():
        pruned.get_parameter("first.weight").mul_(2)
    fxprune.save(pruned, tmp_path / "model.pt")
    assert torch.equal(fxprune.load(tmp_path / "model.pt", Net().eval())(X), pruned(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    net = randomize(Net()).eval().to(dtype)
    pruned = fxprune.compile(net, example_inputs=X.to(dtype))
    fxprune.save(pruned, tmp_path / "model.pt")
    loaded = fxprune.load(tmp_path / "model.pt", Net().to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), pruned.parameters(), strict=True))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


class Structured(Net):
    def forward(self, x: Tensor, rest: dict[str, list[Tensor]], scale: float) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(x) + rest["more"][1] * scale
        return y


def test_inputs_that_are_no_plain_tensors(tmp_path: Path) -> None:
    inputs = (X, {"more": [X, X[:, :, :1]]}, 2.0)
    pruned = fxprune.compile(randomize(Structured()).eval(), example_inputs=inputs)
    fxprune.save(pruned, tmp_path / "model.pt")
    loaded = fxprune.load(tmp_path / "model.pt", Structured().eval())
    assert torch.equal(loaded(*inputs), pruned(*inputs))
    assert fxprune.report(loaded) == fxprune.report(pruned)


def test_inputs_that_a_file_without_code_cannot_hold(tmp_path: Path) -> None:
    pruned = compiled()
    record = pruned.meta["fxprune"]
    pruned.meta["fxprune"] = dataclasses.replace(record, inputs=(object(),))
    with pytest.raises(StorageError, match="example input of type object"):
        fxprune.save(pruned, tmp_path / "model.pt")


def test_the_file_holds_no_code(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert set(content) == {"format", "version", "header", "state", "digest"}
    assert json.loads(content["header"])["inputs"]
    assert set(content["state"]) == set(compiled().state_dict())


def test_saving_over_a_file_leaves_nothing_beside_it(saved: Path) -> None:
    fxprune.save(compiled(), saved)
    assert list(saved.parent.iterdir()) == [saved]


def test_the_file_is_as_readable_as_any_other(saved: Path) -> None:
    other = saved.with_name("other")
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode


# --- what is no such file -------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "does not exist")


def test_a_directory(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")
    with pytest.raises(StorageError, match="the file is a Sequential; it is the first argument"):
        fxprune.load(nn.Sequential(), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    refused(saved, "truncated or not a file")


def test_a_flipped_byte_anywhere_in_a_weight(saved: Path) -> None:
    weight = compiled().get_parameter("first.weight").detach().numpy().tobytes()
    content = bytearray(saved.read_bytes())
    start = content.find(weight)
    assert start > 0
    for offset in (0, len(weight) // 2, len(weight) - 1):
        flipped = bytearray(content)
        flipped[start + offset] ^= 0x40
        saved.write_bytes(flipped)
        refused(saved, "altered|truncated")
    saved.write_bytes(content)
    fxprune.load(saved, Net())


@pytest.mark.parametrize(
    "content", [b"", b"just a text", pickle.dumps({"format": "fxprune"}), b"\x80\x04garbage"], ids=str
)
def test_foreign_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    refused(path, "not a file of fxprune.save|not written by fxprune.save|altered|version")


class Dangerous:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code in the file was run')",)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "dangerous.pt"
    torch.save({"format": "fxprune", "state": Dangerous()}, path)
    refused(path, "not a file of fxprune.save")


@pytest.mark.parametrize("content", [Net().state_dict(), [1, 2], torch.zeros(3), {"format": "other"}])
def test_foreign_content(tmp_path: Path, content: object) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    refused(path, r"not written by fxprune\.save; .*load_state_dict")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version(saved: Path, version: object) -> None:
    altered(saved, lambda content: content.update(version=version))
    refused(saved, f"format version {version}, this fxprune reads version 1")


@pytest.mark.parametrize("part", ["header", "state"])
@pytest.mark.parametrize("value", [None, 7, [1]])
def test_missing_parts(saved: Path, part: str, value: object) -> None:
    altered(saved, lambda content: content.update({part: value}), digest=False)
    refused(saved, "altered")


def test_a_state_that_holds_no_tensors(saved: Path) -> None:
    altered(saved, lambda content: content["state"].update({"first.weight": "text"}), digest=False)
    refused(saved, "altered")


def test_altered_weights(saved: Path) -> None:
    altered(saved, lambda content: content["state"]["first.weight"].mul_(1.001), digest=False)
    refused(saved, "altered: its checksum does not match")


# --- what is one, but of another model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net", [Net(64), nn.Sequential(nn.Conv2d(16, 32, 3)), nn.Linear(3, 3)], ids=["wider", "another", "no convolution"]
)
def test_another_architecture(saved: Path, net: nn.Module) -> None:
    refused(saved, f"does not fit {type(net).__name__}", net)


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.extra(super().forward(x))
        return y


def test_one_layer_more(saved: Path) -> None:
    refused(saved, "does not fit Longer: extra", Longer())


def test_a_table_that_does_not_follow_from_the_plan(saved: Path) -> None:
    tables = [name for name in compiled().state_dict() if name.endswith(".index")]
    altered(saved, lambda content: content["state"].update({tables[0]: content["state"][tables[0]].flip(0)}))
    refused(saved, f"replaying its plan gives another {tables[0]}")


def test_a_plan_that_is_no_plan(saved: Path) -> None:
    altered(saved, lambda content: content.update(header=json.dumps(json.loads(content["header"]) | {"plan": "{}"})))
    refused(saved, "does not fit Net: .*plan")


# --- saving ---------------------------------------------------------------------------------------------------------


def test_a_model_that_was_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(FxpruneError, match="no record of a compilation"):
        fxprune.save(Net(), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["missing/model.pt", "file/model.pt", "directory"])
def test_a_place_that_cannot_be_written(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    with pytest.raises(StorageError, match=r"; (choose another place|make it first|name a file)"):
        fxprune.save(compiled(), tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]
    assert list((tmp_path / "directory").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="no space left"):
        fxprune.save(compiled(), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_control_the_digest_covers_names_types_shapes_and_values() -> None:
    def digest(header: str = "h", name: str = "w", tensor: Tensor | None = None) -> str:
        return storage._digest(header, {name: torch.zeros(2, 3) if tensor is None else tensor})

    others = [
        digest(header="i"), digest(name="v"), digest(tensor=torch.ones(2, 3)), digest(tensor=torch.zeros(3, 2)),
        digest(tensor=torch.zeros(2, 3, dtype=torch.int32)), digest(tensor=torch.zeros(0)),
    ]  # fmt: skip
    assert len({digest(), *others}) == 7
    assert digest() == digest()
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2, 3)}, buffer)
    buffer.seek(0)
    assert digest(tensor=torch.load(buffer, weights_only=True)["w"]) == digest()
