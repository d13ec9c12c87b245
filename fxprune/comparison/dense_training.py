"""The dense network of a comparison, trained where nobody gives it: a training run of its own, done once."""

import json
from collections.abc import Callable
from dataclasses import replace

import torch

from fxprune.comparison.duration import training_seconds
from fxprune.comparison.requests import ComparisonRequest
from fxprune.durations import in_words
from fxprune.models import load_model
from fxprune.training.checkpoints import CheckpointError, check_settings
from fxprune.training.data.pictures import NORMALIZATIONS
from fxprune.training.data.sources import open_data
from fxprune.training.run import TrainingRequest, check_fit, snapshot_file, train


def with_dense(request: ComparisonRequest, told: Callable[[str], object] = print) -> ComparisonRequest:
    """The request with the weights, and the snapshots, of a dense network that is trained first if it is to be.

    Args:
        request: what is compared.
        told: is told before the network is trained.

    Returns:
        The request as it is if nothing is to be trained. What was trained before is not trained again.

    Raises:
        CheckpointError: the folder has a network that was trained otherwise.
        FxpruneError, OSError: see `fxprune.training.run.train`.
    """
    dense, folder = request.dense, request.dense_folder
    if dense is None:
        return request
    asked = TrainingRequest(
        model=request.model,
        data=request.data,
        output=folder,
        recipe=dense.recipe,
        validation=request.validation,
        device=request.device,
        amp=request.amp,
        channels_last=request.channels_last,
        keep_epochs=dense.kept,
        resume=True,
    )
    if not _is_done(asked):
        model = load_model(request.model)
        data = open_data(request.data, validation=request.validation, normalize=NORMALIZATIONS.get(request.model))
        check_fit(model, data.plain_batch(torch.arange(2))[0], data.classes, request.model)
        seconds = training_seconds(model, data, dense.recipe, device=request.device)
        told(f"training the dense network first, {dense.recipe.epochs} epochs, {in_words(seconds)} here, into {folder}")
        train(asked)
    snapshots = [snapshot_file(folder, epoch) for epoch in dense.kept]
    absent = [path for path in snapshots if not path.exists()]
    if absent:
        raise CheckpointError(f"{absent[0]}: absent; remove {folder}, and the dense network is trained anew")
    return replace(request, weights=folder / "model.pt", snapshots=snapshots or request.snapshots)


def _is_done(asked: TrainingRequest) -> bool:
    """Whether a run has ended that was asked for the same.

    Raises:
        CheckpointError: it was asked for something else, or its log is damaged.
    """
    path = asked.output / "log.json"
    if not path.exists():
        return False
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        settings, ended = log["settings"], "result" in log
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no log of a training ({error}); remove {asked.output}") from error
    if ended:
        # as JSON has them, where a tuple is a list
        check_settings(path, settings, json.loads(json.dumps(asked.settings())))
    return ended
