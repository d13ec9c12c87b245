"""Models by name: torchvision, timm, the small ones of this package, or any callable that returns a module."""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fxprune.errors import FxpruneError, StorageError
from fxprune.files import read_state_dict, without_prefix
from fxprune.models.cifar import CIFAR_MODELS
from fxprune.models.digits import DIGITS_MODELS

OWN_MODELS = {**CIFAR_MODELS, **DIGITS_MODELS}
"""Small networks for small images, by name. Neither torchvision nor timm has one of these names."""


class ModelNameError(FxpruneError):
    """No model goes by this name, or what goes by it is not a model."""


def load_model(name: str, weights: str | Path | None = None, seed: int = 0) -> nn.Module:
    """Build a model, in evaluation mode, on the CPU.

    Args:
        name: a torchvision model (`resnet50`); one of `OWN_MODELS` (`resnet20`); a timm model if timm is installed
            (`timm:resnest14d`, or `resnest14d` alone where nobody else has that name); or `module:callable` or
            `path/to/file.py:callable`, called without arguments. `NAME?classes=N` tells so many classes apart in place
            of the model's own number.
        weights: a file with a state dict, of safetensors or loaded with `weights_only=True`, as training scripts leave
            it: under `state_dict`, `model` or averaged under `state_dict_ema`, with the prefix `module.` of
            `nn.DataParallel` or `_orig_mod.` of `torch.compile`. Or the name of published weights, `"DEFAULT"` or one
            of torchvision's, which are downloaded. Without it the weights are random.
        seed: of the random weights, so that the same call builds the same model.

    Raises:
        ModelNameError: there is no such model, or what builds it fails.
        StorageError: the file cannot be read, or belongs to another model.
    """
    published = weights is not None and is_published(weights)
    build = _builder(name, str(weights) if published else None)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        try:
            model = build()
        except FxpruneError:
            raise
        except Exception as error:  # the user's function, or a library's
            if published:
                raise StorageError(
                    f"{name}: its published weights {weights} cannot be had: {_said(error)}. Without a network, "
                    "download them elsewhere and give the file: --weights FILE"
                ) from error
            raise ModelNameError(f"{name}: called without arguments, it raises {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelNameError(f"{name}: returned a {type(model).__name__}; a model must be a torch.nn.Module")
    if weights is not None and not published:
        _load_weights(model, name, Path(weights))
    return model.eval()


def is_published(weights: str | Path) -> bool:
    """Whether this is the name of published weights, such as `DEFAULT` or `IMAGENET1K_V2`, and no file."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", str(weights)) is not None and not Path(weights).exists()


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """The shape of an input batch that `model` was made for, `(2, C, H, W)`.

    timm says it of its models, and `OWN_MODELS` say it in the same way; Inception takes 299 pixels, and all others are
    taken to want 224. The batch is 2, so that BatchNorm can be run in training mode too.
    """
    config = getattr(model, "default_cfg", None)
    if isinstance(config, dict) and "input_size" in config:
        return (2, *config["input_size"])
    pixels = 299 if isinstance(model, torchvision.models.Inception3) else 224
    return (2, 3, pixels, pixels)


def example_inputs(size: Sequence[int], seed: int = 0) -> tuple[Tensor]:
    """One standard normal float32 tensor of shape `size`, as the inputs of a model."""
    return (torch.randn(tuple(size), generator=torch.Generator().manual_seed(seed)),)


def without_options(name: str) -> str:
    """The name of a model without what it was asked to be: `resnet18` of `resnet18?classes=101`."""
    return name.partition("?")[0]


def _options_of(name: str) -> dict[str, Any]:
    """Arguments of a model that stand behind its name.

    Raises:
        ModelNameError: they are no number of classes.
    """
    _, mark, text = name.partition("?")
    match = re.fullmatch(r"classes=([1-9]\d*)", text)
    if mark and match is None:
        raise ModelNameError(
            f"{name}: only ?classes=N may stand behind the name of a model, as in resnet18?classes=101"
        )
    return {} if match is None else {"num_classes": int(match[1])}


def _builder(name: str, weights: str | None = None) -> Callable[[], Any]:
    given, name = _options_of(name), without_options(name)
    source, colon, rest = name.partition(":")
    if given and weights is not None and source != "timm":
        raise ModelNameError(f"{name}: its published weights are for its own classes; leave ?classes= or them out")
    if source == "timm" and colon:
        return _timm_builder(rest, weights, given)
    if (colon or name in OWN_MODELS) and weights is not None:
        raise ModelNameError(f"{name}: has no published weights {weights}; give a file: --weights FILE")
    if colon:
        if given:
            raise ModelNameError(f"{name}: a function of your own is called without arguments; leave ?classes= out")
        return _callable_builder(name, source, rest)
    if name in torchvision.models.list_models():
        return lambda: torchvision.models.get_model(name, **_torchvision_options(name, weights), **given)
    if name in OWN_MODELS:
        return partial(OWN_MODELS[name], **given)
    if _timm_names(name):
        return _timm_builder(name, weights, given)
    raise ModelNameError(
        f"{name}: no such model{_did_you_mean(name)}; see torchvision.models.list_models(), or give one of your own as "
        "path/to/file.py:callable"
    )


def _torchvision_options(name: str, weights: str | None) -> dict[str, Any]:
    """Arguments that keep torchvision from downloading what was not asked for, and from warning of new initial weights.

    Raises:
        ModelNameError: there are no such weights.
    """
    if weights is not None:
        known = [entry.name for entry in torchvision.models.get_model_weights(name)]
        if weights != "DEFAULT" and weights not in known:
            raise ModelNameError(f"{name}: has no weights {weights}; choose from DEFAULT, {', '.join(known)}")
        return {"weights": weights}
    accepted = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    return options


def _timm_names(pattern: str) -> list[str]:
    if importlib.util.find_spec("timm") is None:
        return []
    import timm

    return list(timm.list_models(pattern))


def _timm_builder(name: str, weights: str | None, given: dict[str, Any]) -> Callable[[], Any]:
    if importlib.util.find_spec("timm") is None:
        raise ModelNameError(f"timm:{name}: timm is not installed; pip install timm")
    if not _timm_names(name):
        raise ModelNameError(f"timm:{name}: no such model in timm{_did_you_mean(name)}; see timm.list_models()")
    import timm

    if weights not in (None, "DEFAULT"):
        raise ModelNameError(f"timm:{name}: has no weights {weights}; in timm they are part of the name, or DEFAULT")
    return lambda: timm.create_model(name, pretrained=weights is not None, **given)


def _callable_builder(name: str, module_name: str, attribute: str) -> Callable[[], Any]:
    # A console script, unlike `python -m`, does not look for modules in the current directory.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = _file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except ModelNameError:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        raise ModelNameError(f"{name}: cannot import {module_name!r}: {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ModelNameError(f"{name}: {module_name!r} has no {attribute!r}{_similar(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelNameError(f"{name}: is a {type(found).__name__}; it must be callable")
    return found


def call_by_name(name: str) -> Any:
    """What `module:callable` or `path/to/file.py:callable` returns, called without arguments.

    Raises:
        ModelNameError: there is no such function, or it fails.
    """
    module, _, attribute = name.rpartition(":")
    function = _callable_builder(name, module, attribute)
    try:
        return function()
    except Exception as error:  # the user's function
        raise ModelNameError(f"{name}: called without arguments, it raises {_told(error)}") from error


def _file(path: Path) -> Any:
    """Import a file by its path; modules beside it are found, as when it is run."""
    if not path.is_file():
        raise ModelNameError(
            f"{path}: no such file; something of your own is path/to/file.py:callable or module:callable"
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # pickling and dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if known is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = known
        raise
    return module


def _told(error: Exception) -> str:
    """An error in one line, with the place in the file where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{_said(error)} ({Path(last.filename).name}, line {last.lineno})"


def _said(error: Exception) -> str:
    """An error in one line."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{said and ': ' + said}"


def _did_you_mean(name: str) -> str:
    return _similar(name, [*torchvision.models.list_models(), *OWN_MODELS, *_timm_names("*")])


def _similar(name: str, candidates: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, dict.fromkeys(candidates))
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    state = without_prefix(read_state_dict(path), model.state_dict().keys())
    _check_state(model, state, f"{path}: not the weights of {name}")
    model.load_state_dict(state, strict=False)


def _check_state(model: nn.Module, state: dict[str, Tensor], complaint: str) -> None:
    expected = model.state_dict()
    # num_batches_tracked came with torch 0.4.1; older checkpoints lack it, and evaluation does not read it.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = [
        f"{label} {_first(keys)}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("shape of", reshaped))
        if keys
    ]
    if faults:
        raise StorageError(f"{complaint}: {'; '.join(faults)}")


def _first(keys: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
