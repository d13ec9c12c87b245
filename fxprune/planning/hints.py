"""Arguments that fxprune does not have: what those of other pruners are called here."""

from collections.abc import Iterable
from dataclasses import fields

from fxprune.errors import ArgumentError, near_matches
from fxprune.planning.requests import Request

# Of Torch-Pruning 1.6 (`BasePruner.__init__`), NVIDIA's modelopt (`mtp.prune`) and NNI 3 (`config_list`).
ELSEWHERE = {
    "pruning_ratio": "ratio=",
    "ch_sparsity": "ratio=",
    "sparsity": "ratio=",
    "sparse_ratio": "ratio=",
    "amount": "ratio=",
    "pruning_ratio_dict": "ratio={pattern: share}",
    "ch_sparsity_dict": "ratio={pattern: share}",
    "ignored_layers": "ignore=, which takes names, modules and types",
    "exclude": "ignore=",
    "importance": "criterion=",
    "global_pruning": "granularity='filter' with scope='global'",
    "isomorphic": "granularity='filter' with scope='local'",
    "iterative_steps": "fxprune.sparsify(model, 'iterative', steps=...) in the training loop",
    "dummy_input": "example_inputs=",
    "example_input": "example_inputs=",
    "inputs": "example_inputs=",
    "data": "calibration=",
    "loader": "calibration=",
    "dataloader": "calibration=",
    "data_loader": "calibration=",
    "constraints": "macs= or params=, a share to keep such as 0.5",
    "flops": "macs=, the share to keep",
    "target_flops": "macs=, the share to keep",
    "channel_groups": "groups=",
    "n_groups": "groups=",
    "num_groups": "groups=",
}
"""What an argument of another pruner is called in `fxprune.compile`."""


def refuse_unknown(names: Iterable[str]) -> None:
    """See that no argument is unknown.

    Raises:
        ArgumentError: one is; the message says what it is called here, or names near ones.
    """
    for name in names:
        known = [field.name for field in fields(Request)] + [
            "example_inputs",
            "calibration",
            "output",
            "bake",
            "verify",
        ]
        meant = f"; here it is {ELSEWHERE[name]}" if name in ELSEWHERE else near_matches(name, known)
        raise ArgumentError(f"there is no argument {name!r}{meant}")
