"""Tickets: early weights under a plan's mask, and random plans of the same counts."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PlanError
from fxprune.planning.filters import removed_units
from fxprune.plans.masking import kept_entries
from fxprune.training import tickets


def net(seed: int) -> nn.Module:
    """Three convolutions that can be pruned, and BatchNorm with statistics of its own."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Conv2d(32, 16, 1),
        )
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 2)
        return model


TRAINED, EARLY = net(0), net(1)
PLAN = fxprune.make_plan(TRAINED, ratio=0.5, form="overlap")


def weights_not_early(ticket: nn.Module) -> list[str]:
    """Parameters of which a ticket has not the early values where the plan keeps them, or not zero elsewhere."""
    kept = kept_entries(TRAINED, PLAN)
    early = dict(EARLY.named_parameters())
    return [
        name
        for name, parameter in ticket.named_parameters()
        if not name.startswith("1.")
        and not torch.equal(parameter, torch.where(kept.get(name, torch.tensor(True)), early[name], 0))
    ]


def test_early_weights_where_the_plan_keeps_them_and_zero_elsewhere() -> None:
    before = copy.deepcopy(TRAINED.state_dict())
    ticket = fxprune.rewind(TRAINED, PLAN, EARLY)
    assert weights_not_early(ticket) == []
    assert weights_not_early(fxprune.mask(TRAINED, PLAN)) == [n for n, _ in TRAINED.named_parameters() if n[0] != "1"]
    assert weights_not_early(EARLY) == [f"{name}.weight" for name in PLAN.layers]
    assert all(torch.equal(before[key], value) for key, value in TRAINED.state_dict().items())
    assert ticket.state_dict()["3.weight"].data_ptr() != EARLY.state_dict()["3.weight"].data_ptr()
    small = fxprune.rewrite(ticket, PLAN)  # refuses what is not zero
    assert fxprune.report(small).layers


def test_batch_norm_begins_anew_or_goes_back() -> None:
    def norm(ticket: nn.Module) -> dict[str, Tensor]:
        return dict(ticket.get_submodule("1").state_dict())

    reset, fresh = norm(fxprune.rewind(TRAINED, PLAN, EARLY)), nn.BatchNorm2d(32).state_dict()
    assert all(torch.equal(reset[key], fresh[key]) for key in fresh)
    rewound = norm(fxprune.rewind(TRAINED, PLAN, EARLY, batch_norm="rewind"))
    assert all(torch.equal(rewound[key], value) for key, value in norm(EARLY).items())
    assert not torch.equal(rewound["weight"], reset["weight"])


def test_every_form_of_the_early_state(tmp_path: Path) -> None:
    path = tmp_path / "early.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in EARLY.state_dict().items()}}, path)
    for early in (path, str(path), EARLY.state_dict(), nn.DataParallel(EARLY)):
        assert weights_not_early(fxprune.rewind(TRAINED, PLAN, early)) == []


def changed(key: str, value: Tensor | None) -> dict[str, Tensor]:
    state = dict(EARLY.state_dict())
    del state[key]
    return state if value is None else state | {key: value}


@pytest.mark.parametrize(
    "early,message",
    [
        (changed("3.bias", None), r"early: the early state has no '3.bias'.*pass a state of the same model"),
        (EARLY.state_dict() | {"9.bias": torch.ones(2)}, r"early: the model has no '9.bias'"),
        (changed("3.weight", torch.ones(2)), r"early: '3.weight' has shape \(2,\), in the model \(32, 32, 3, 3\)"),
        (changed("3.bias", torch.full((32,), torch.nan)), r"early: '3.bias' holds NaN or infinity"),
        ("nowhere.pt", r"early: nowhere.pt: cannot be read"),
        (3, r"early is a int that holds no state dict"),
    ],
)
def test_an_early_state_that_does_not_fit_is_named(early: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxprune.rewind(TRAINED, PLAN, early)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(PlanError, match=r"batch_norm is 'keep'; it must be 'reset' or 'rewind'"):
        fxprune.rewind(TRAINED, PLAN, EARLY, batch_norm="keep")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"seed is -1"):
        fxprune.random_ticket(TRAINED, PLAN, -1)
    with pytest.raises(PlanError, match=r"0: the plan is for 32 filters of 16 channels"):
        fxprune.random_ticket(nn.Sequential(nn.Conv2d(16, 16, 3)), PLAN, 0)


OPTIONS: dict[str, dict[str, Any]] = {
    "overlap": {"ratio": 0.6, "form": "overlap"},
    "partition": {"ratio": 0.5, "form": "partition"},
    "blocks": {"ratio": 0.5, "form": "overlap", "block": 4},
    "partition in blocks": {"ratio": 0.5, "form": "partition", "block": 8},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_random_ticket_has_the_same_counts(options: str) -> None:
    plan = fxprune.make_plan(TRAINED, **OPTIONS[options])
    ticket = fxprune.random_ticket(TRAINED, plan, seed=3)
    assert ticket.layers.keys() == plan.layers.keys()
    assert ticket.skipped == plan.skipped
    for name, kernels in plan.layers.items():
        drawn = ticket.layers[name]
        counts = [(k.groups, k.group_width, k.kept_channels, k.block, k.form) for k in (drawn, kernels)]
        assert counts[0] == counts[1]
        assert drawn.kept != kernels.kept
        assert drawn.out_order != kernels.out_order
    assert PLAN.from_json(ticket.to_json()) == ticket
    assert fxprune.random_ticket(TRAINED, plan, seed=3) == ticket
    assert fxprune.random_ticket(TRAINED, plan, seed=4).layers != ticket.layers


def test_random_tickets_are_uniform() -> None:
    """Each kernel of a layer is kept about as often as any other: 60 draws of a share of 1/2, 5 standard errors."""
    plan = fxprune.PrunePlan({"3": PLAN.layers["3"]})
    draws = torch.stack([fxprune.random_ticket(TRAINED, plan, seed).layers["3"].mask().double() for seed in range(60)])
    assert (draws.mean(0) - 0.5).abs().max() < 5 * (0.25 / 60) ** 0.5
    assert (PLAN.layers["3"].mask().double() - 0.5).abs().max() == 0.5  # the control: one plan is far from it


def test_layers_that_share_their_groups_still_do() -> None:
    chain = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)))
    kernels = fxprune.make_plan(chain, form="overlap").layers["0"]
    shared = fxprune.PrunePlan({"0": kernels, "1": kernels})
    drawn = fxprune.random_ticket(chain, shared, 0).layers
    assert drawn["0"].out_order == drawn["1"].out_order
    assert drawn["0"].kept != drawn["1"].kept
    apart = fxprune.random_ticket(chain, fxprune.make_plan(chain, form="overlap"), 0).layers
    assert apart["0"].out_order != apart["1"].out_order


# --- whole filters ----------------------------------------------------------------------------------------------------


class Streams(nn.Module):
    """A residual stream, the filters of a branch, and an ignored convolution: three spaces of 16, 24 and 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, padding=1)
        self.back = nn.Conv2d(24, 16, 3, padding=1)
        self.whole = nn.Conv2d(16, 8, 1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.norm(self.stem(x)).relu()
        stream = stream + self.back(self.wide(stream).relu())
        logits: Tensor = self.linear(self.whole(stream).mean((2, 3)))
        return logits


STREAMS, EXAMPLE = Streams().eval(), torch.zeros(2, 3, 8, 8)
FILTERS: dict[str, dict[str, Any]] = {
    "filters": {"granularity": "filter", "macs": 0.4, "variety": "pairs", "ignore": "whole"},
    "both": {"granularity": {"filter": 0.25, "kernel": 0.5}, "groups": 2},
}


def counts(plan: fxprune.PrunePlan) -> dict[str, tuple[int, int]]:
    return {name: (len(channels.outputs), len(channels.inputs)) for name, channels in plan.removed.items()}


@pytest.mark.parametrize("options", FILTERS)
def test_a_random_ticket_of_filters_has_the_same_counts(options: str) -> None:
    """It can be masked, held and rewritten, and the small networks have equal shapes."""
    plan = fxprune.make_plan(STREAMS, example_inputs=EXAMPLE, **FILTERS[options])
    ticket = fxprune.random_ticket(STREAMS, plan, 3, EXAMPLE)
    assert plan.removed
    assert counts(ticket) == counts(plan)
    assert ticket.removed["stem"].outputs == ticket.removed["back"].outputs == ticket.removed["norm"].outputs
    assert ticket.removed["wide"].outputs != plan.removed["wide"].outputs
    assert ticket.removed["wide"].asked_ratio == plan.removed["wide"].asked_ratio
    assert ticket.removed["wide"].redundancy is None
    assert ("whole" in ticket.removed and bool(ticket.removed["whole"].outputs)) == (options == "both")
    assert plan.from_json(ticket.to_json()) == ticket
    assert fxprune.random_ticket(STREAMS, plan, 3, EXAMPLE) == ticket
    assert fxprune.random_ticket(STREAMS, plan, 4, EXAMPLE).removed != ticket.removed
    small = []
    for chosen in (plan, ticket):
        rewound = fxprune.rewind(STREAMS, chosen, STREAMS, batch_norm="rewind")
        rewritten = fxprune.rewrite(rewound, chosen, EXAMPLE)
        fxprune.verify(rewritten, rewound, (torch.randn(2, 3, 8, 8),))
        small.append([tuple(p.shape) for p in rewritten.parameters()])
    assert small[0] == small[1]
    assert sum(map(len, small[0])) > 0


def test_a_plan_whose_channels_do_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fxprune.make_plan(STREAMS, example_inputs=EXAMPLE, **FILTERS["filters"])
    torn = replace(plan, removed={**plan.removed, "back": replace(plan.removed["back"], outputs=(0,))})
    with pytest.raises(PlanError, match=r"(stem|back|norm|wide|whole): the plan removes channels of it that do not go"):
        fxprune.random_ticket(STREAMS, torn, 0, EXAMPLE)
    monkeypatch.setattr(tickets, "removed_units", lambda removable, plan: ~removed_units(removable, plan))
    with pytest.raises(PlanError, match=r"do not go together, or not all that do"):
        fxprune.random_ticket(STREAMS, plan, 0, EXAMPLE)
