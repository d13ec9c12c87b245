"""Models by name: where they come from, which weights they take, and what is said of a wrong name or file."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fxprune.errors import FxpruneError, StorageError
from fxprune.models import ModelNameError, default_input_size, example_inputs, load_model
from fxprune.models.by_name import OWN_MODELS

NET = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
def number():
    return 7
class Nets:
    tiny = nn.Conv2d
    small = staticmethod(small)
WIDTH = 8
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module, in the current directory, that is not on the path."""
    (tmp_path / "handmade_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "handmade_net", raising=False)
    return "handmade_net"


def test_a_torchvision_name() -> None:
    model = load_model("squeezenet1_1")
    assert type(model).__name__ == "SqueezeNet"
    assert not model.training


def test_a_segmentation_model_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert type(load_model("lraspp_mobilenet_v3_large")).__name__ == "LRASPP"


def test_a_callable_of_a_module_in_the_current_directory(net: str) -> None:
    assert isinstance(load_model(f"{net}:small"), nn.Sequential)
    assert isinstance(load_model(f"{net}:Nets.small"), nn.Sequential)


def test_the_seed_makes_the_random_weights(net: str) -> None:
    first, again, other = (load_model(f"{net}:small", seed=seed).state_dict()["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "name,message",
    [
        ("resnet_50", r"resnet_50: no such model; did you mean resnet50"),
        ("qqqq", r"qqqq: no such model; see"),
        ("nowhere_at_all:net", r"cannot import 'nowhere_at_all'"),
        ("handmade_net:smal", r"'handmade_net' has no 'smal'; did you mean small\?"),
        ("handmade_net:number", r"returned a int; a model must be a torch.nn.Module"),
        ("handmade_net:WIDTH", r"is a int; it must be callable"),
    ],
)
@pytest.mark.usefixtures("net")
def test_a_wrong_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ModelNameError, match=message):
        load_model(name)


def test_timm_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.models.by_name.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNameError, match="timm is not installed"):
        load_model("timm:resnet10t")


@pytest.mark.parametrize("name", OWN_MODELS)
def test_own_names(name: str) -> None:
    model = load_model(name)
    size = default_input_size(model)
    assert size == ((2, 1, 8, 8) if name == "digits_resnet" else (2, 3, 32, 32))
    assert model(torch.zeros(size)).shape == (2, 10)


@pytest.mark.parametrize("name", [*OWN_MODELS, "resnet18", "timm:resnet10t"])
def test_a_model_for_so_many_classes(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        assert list(load_model(f"{name}?classes=7").parameters())[-1].shape == (7,)
        assert list(load_model(name).parameters())[-1].shape != (7,), "control"


@pytest.mark.parametrize(
    "name, weights, said",
    [
        ("resnet18?classes=0", None, r"only \?classes=N may stand behind the name"),
        ("resnet18?width=2", None, r"only \?classes=N may stand behind the name"),
        ("resnet18?", None, r"only \?classes=N may stand behind the name"),
        ("resnet18?classes=7", "DEFAULT", "published weights are for its own classes"),
        ("torchvision.models:resnet18?classes=7", None, "called without arguments; leave"),
        ("resnet81?classes=7", None, "resnet81: no such model; did you mean resnet18"),
    ],
)
def test_what_may_stand_behind_a_name(name: str, weights: str | None, said: str) -> None:
    with pytest.raises(ModelNameError, match=said):
        load_model(name, weights)


def test_no_own_name_hides_another() -> None:
    assert not OWN_MODELS.keys() & set(torchvision.models.list_models())
    timm = pytest.importorskip("timm")
    assert not OWN_MODELS.keys() & set(timm.list_models("*"))


def test_own_names_are_suggested() -> None:
    with pytest.raises(ModelNameError, match="did you mean resnet56"):
        load_model("resnet57")


def test_timm_names() -> None:
    pytest.importorskip("timm")
    model = load_model("timm:resnet10t")
    assert default_input_size(model) == (2, 3, 176, 176)
    assert type(load_model("resnet10t")) is type(model)
    with pytest.raises(ModelNameError, match=r"no such model in timm; did you mean .*resnet10t"):
        load_model("timm:resnet10tt")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_weights_are_loaded(net: str, tmp_path: Path, wrap: object) -> None:
    assert callable(wrap)
    state = load_model(f"{net}:small", seed=5).state_dict()
    torch.save(wrap(state), tmp_path / "weights")
    loaded = load_model(f"{net}:small", weights=tmp_path / "weights").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert not torch.equal(load_model(f"{net}:small").state_dict()["0.weight"], state["0.weight"])


def test_old_checkpoints_lack_num_batches_tracked(net: str, tmp_path: Path) -> None:
    state = load_model(f"{net}:small").state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "weights")
    load_model(f"{net}:small", tmp_path / "weights")


@pytest.mark.parametrize(
    "content,message",
    [
        ({"0.weight": torch.zeros(8, 3, 3, 3)}, r"not the weights of .*: missing 1.weight, 1.bias, .* and 1 more"),
        ({"stray": torch.zeros(1)}, r"unexpected stray"),
        ({"0.weight": torch.zeros(8, 4, 3, 3)}, r"shape of 0.weight \(8, 4, 3, 3\) instead of \(8, 3, 3, 3\)"),
        ({"epoch": 3}, r"holds no state dict"),
        ([1, 2], r"holds no state dict"),
        (nn.Conv2d(1, 1, 1), r"holds a pickled torch"),
    ],
)
def test_wrong_weights_are_refused(net: str, tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights")
    with pytest.raises(StorageError, match=message):
        load_model(f"{net}:small", tmp_path / "weights")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_a_file_of_something_else_is_refused(net: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(StorageError, match="not a file of tensors"):
        load_model(f"{net}:small", tmp_path / "weights")


def test_an_absent_file_is_named(net: str, tmp_path: Path) -> None:
    with pytest.raises(FxpruneError, match=r"absent.pt: cannot be read: No such file"):
        load_model(f"{net}:small", tmp_path / "absent.pt")


def test_example_inputs_follow_the_seed() -> None:
    (first,), (again,), (other,) = (example_inputs((2, 3, 4, 4), seed) for seed in (0, 0, 1))
    assert first.shape == (2, 3, 4, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_inception_wants_299_pixels() -> None:
    assert default_input_size(load_model("inception_v3")) == (2, 3, 299, 299)
    assert default_input_size(nn.Conv2d(3, 3, 1)) == (2, 3, 224, 224)
