"""Choose filter groups and their input channels so that the refitted layer errs least: second-order, in closed form.

For given inputs `u` and targets `t` of a layer, the squared error of the best weights over a set of input channels
follows from the Gram matrix `u^T u` and the cross products `t^T u` alone. Alternate between the two halves of the
problem, as `cocluster` does, but with this error in place of the kept weight:

1. channels, given the groups: starting from all channels, each group gives up the channel whose loss costs least when
   the other weights adapt (Hassibi, Stork, "Optimal Brain Surgeon", NeurIPS 1992, equation 5, here for a block of
   `kh * kw` weights of every filter of the group at once). In partition form a channel that only one group still reads
   stays there, and a group that has come down to its share gives up no more.
2. filters, given the channels: the error of each filter in each group, and a balanced assignment.

Where channels are kept in aligned blocks, a block takes the place of a channel: its weights are given up together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.methods.clustering import Clustering, Labels, Mask, Matrix
from fxprune.methods.cocluster import assign_balanced, cocluster, share_lost
from fxprune.plans import Form

# Added to the diagonal, relative to its mean: dead and collinear inputs leave a matrix that can be inverted.
DAMPING = 1e-4
# Rounds, and the relative gain below which they end. Above LARGE inputs of a filter there is only one, and the costs of
# the channels are computed once, for time: to adapt 4608 inputs after each step would take a quarter of an hour. They
# only rank the channels then, so float32 will do for them.
ROUNDS = 6
ENOUGH = 1e-3
LARGE = 1200
# The share of the channels that go before costs are computed anew; one at a time up to 64 channels.
BATCH = 1 / 64
EMPTY = 1 / 8
"""Share of the inputs in the matrices that may have gone: products with them cost as much as with others."""


def reconstruction(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    energy: Tensor,
    groups: int,
    kept: int,
    form: Form = "overlap",
    seed: int = 0,
    block: int = 1,
    labels: Labels | None = None,
) -> Clustering:
    """Group the filters and choose the input channels of each group so that the refitted layer errs little.

    The search starts from what `cocluster` gives for the energy of each kernel's output.

    Args:
        weight: `(O, C, *kernel)` of the dense layer.
        gram: `(D, D)` float64, mean of `u^T u` over input patches `u`, `D = C * taps`.
        cross: `(O, D)` float64, mean of `t^T u` for the wanted outputs `t`.
        energy: `(O,)` float64, mean of `t^2`.
        groups: `n`, a divisor of `O`.
        kept: `k`, input channels of each group.
        form: see `cocluster`.
        seed: see `cocluster`.
        block: see `cocluster`.
        labels: see `cocluster`: with groups given only the channels are chosen.

    Returns:
        The clustering. Its history holds the mean squared error of the outputs, negated, so that it rises: for the
        channels of the start, then after each round of both half-steps. Its block cost is the share of the energy of
        the outputs that the same groups of filters explain with single channels, but not with blocks.
    """
    damped = _damped(gram)
    inverse = _inverse(damped)
    given = labels
    start = cocluster(kernel_energy(weight, gram), groups, kept, form, seed, block=block, labels=given)
    labels = np.empty(len(weight), dtype=np.intp)
    labels[list(start.out_order)] = np.arange(len(weight)) * groups // len(weight)
    chosen: Mask = np.zeros((groups, weight.shape[1] // block), dtype=np.bool_)  # (n, C / block)
    np.put_along_axis(chosen, np.array(start.kept)[:, ::block] // block, True, axis=1)
    best: tuple[Labels, Mask] = labels, chosen
    history: list[float] = []
    for turn in range(1 + (ROUNDS if given is None and gram.shape[0] <= LARGE else 1)):
        if turn:
            chosen = _choose(inverse, cross, labels, block * weight[0, 0].numel(), kept // block, form)
        errors = filter_errors(damped, cross, energy, chosen)  # (O, n)
        if given is None:
            labels = assign_balanced(-errors, labels)
        reached = -float(errors[np.arange(len(labels)), labels].sum())
        if history and reached <= history[-1] + ENOUGH * abs(history[-1]):
            break
        best = labels, chosen
        history.append(reached)
    labels, chosen = best
    cost = None
    if block > 1:
        free = _choose(inverse, cross, labels, weight[0, 0].numel(), kept, form)
        error = float(filter_errors(damped, cross, energy, free)[np.arange(len(labels)), labels].sum())
        cost = share_lost(float(energy.sum()) + history[-1], float(energy.sum()) - error)
    return Clustering.from_labels(labels, chosen.repeat(block, axis=1), tuple(history), cost)


def elimination_order(
    weight: Tensor, gram: Tensor, cross: Tensor, groups: int, seed: int = 0, probes: int | None = None
) -> tuple[Labels, Labels]:
    """In what order groups of filters give up their input channels, in overlap form.

    The groups are those that `cocluster` finds where half of the channels stay. Above `LARGE` inputs the channels go
    in the order of their costs at the start.

    Args:
        weight, gram, cross, groups, seed: see `reconstruction`.
        probes: about how many of the groups, spread over the layer, are followed; all if not given.

    Returns:
        The filters of each `(n, O / groups)`, and its channels `(n, C)`, the first to go first.
    """
    channels, area = weight.shape[1], weight[0, 0].numel()
    inverse = damped_inverse(gram)
    start = cocluster(kernel_energy(weight, gram), groups, max(1, channels // 2), seed=seed)
    filters = np.array(start.out_order).reshape(groups, -1)[:: max(1, groups // (probes or groups))]
    members = (torch.from_numpy(group).to(cross.device) for group in filters)
    order = [give_up_together([Elimination(inverse, cross[group], area)], 0).cpu().numpy() for group in members]
    return filters, np.stack(order)


def kernel_energy(weight: Tensor, gram: Tensor) -> Matrix:
    """`(O, C)`: the squared weights of each kernel times the mean squares of the inputs they meet."""
    energy = weight.detach().double().flatten(1).square() * gram.diagonal()
    importance: Matrix = energy.reshape(*weight.shape[:2], -1).sum(2).cpu().numpy()
    return importance


def filter_errors(gram: Tensor, cross: Tensor, energy: Tensor, chosen: Mask) -> Matrix:
    """`(O, n)`: mean squared error of each filter if it had the channels of each group, with the best weights.

    `chosen` marks channels `(n, C)` or blocks of them `(n, C / block)`.
    """
    area = gram.shape[0] // chosen.shape[1]
    errors = []
    for channels in chosen:
        columns = torch.from_numpy(np.flatnonzero(np.repeat(channels, area))).to(gram.device)
        factor = torch.linalg.cholesky(gram[columns[:, None], columns])
        explained = torch.linalg.solve_triangular(factor, cross[:, columns].T, upper=False).square().sum(0)
        errors.append(energy - explained)
    result: Matrix = torch.stack(errors, 1).cpu().numpy()
    return result


class Elimination:
    """The input channels that a group of filters still reads, and what the loss of each would cost.

    Args:
        inverse: `(D, D)`, of the damped Gram matrix of all inputs, see `damped_inverse`. It is not changed.
        cross: `(d, D)` float64, cross products of the wanted outputs of the group.
        owner: `(D,)` the channel that each input belongs to, or -1 if it never goes; or the number of inputs of each
            channel, side by side: the taps of a kernel, `kh * kw`. Where channels go in blocks, or other sets, all that
            is said of a channel is said of such a set.
        channels: their number, `C`, if some may own no input; else that of the owners.
    """

    def __init__(self, inverse: Tensor, cross: Tensor, owner: Tensor | int, channels: int | None = None) -> None:
        self._inverse, self._weight = inverse.clone(), cross.to(inverse) @ inverse
        self.inputs = len(inverse)
        if isinstance(owner, int):
            owner = torch.arange(self.inputs, device=inverse.device) // owner
        count = max(channels or 0, int(owner.max()) + 1)
        self.alive = torch.ones(count, dtype=torch.bool, device=inverse.device)
        self._owner, self._gone = owner, 0
        self._alike = self._places()

    def costs(self) -> Tensor:
        """`(C,)`: by how much the squared error grows if a channel goes and the other weights adapt; inf if it went."""
        costs = self._weight.new_zeros(len(self.alive))
        for which, inputs in self._alike:
            diagonal = self._inverse[inputs[:, :, None], inputs[:, None]]  # (n, a, a)
            weight = self._weight[:, inputs].permute(1, 2, 0)  # (n, a, d)
            costs[which] = (weight * torch.linalg.solve(diagonal, weight)).sum((1, 2))
        return torch.where(self.alive, costs.double(), torch.inf)

    def drop(self, channels: Tensor, adapt: bool = True) -> None:
        """Remove channels and adapt the weights of those that stay, unless nothing will be asked of them."""
        self.alive[channels] = False
        if not adapt:
            return
        gone = torch.isin(self._owner, channels).nonzero().flatten()
        update = torch.linalg.solve(self._inverse[gone[:, None], gone], self._inverse[gone])
        self._weight.addmm_(self._weight[:, gone], update, alpha=-1)
        self._inverse.addmm_(self._inverse[:, gone], update, alpha=-1)
        self._weight[:, gone] = 0
        self._inverse[gone] = 0
        self._inverse[:, gone] = 0
        self._inverse[gone, gone] = 1
        self._gone += len(gone)
        if self._gone > EMPTY * len(self._owner):
            self._forget()

    def _places(self) -> list[tuple[Tensor, Tensor]]:
        """Channels of equally many inputs: which, and the places of their inputs in the matrices `(n, a)`."""
        taken = self._owner[self._owner >= 0]
        sizes = taken.bincount(minlength=len(self.alive))
        order = self._owner.argsort(stable=True)[len(self._owner) - len(taken) :]  # inputs, channel by channel
        first, found = sizes.cumsum(0) - sizes, []
        for size in sorted(set(sizes[sizes > 0].tolist())):
            which = (sizes == size).nonzero().flatten()
            found.append((which, order[first[which][:, None] + torch.arange(size, device=order.device)]))
        return found

    def _forget(self) -> None:
        """Leave the inputs of channels that went out of the matrices."""
        stay = ((self._owner < 0) | self.alive[self._owner.clamp(min=0)]).nonzero().flatten()
        self._inverse, self._weight = self._inverse[stay[:, None], stay], self._weight[:, stay]
        self._owner, self._gone = self._owner[stay], 0
        self._alike = self._places()


class Summation:
    """The same for filters whose other weights do not adapt: what their channels cost adds up.

    Args:
        costs: `(C,)` float64.
    """

    inputs = 0

    def __init__(self, costs: Tensor) -> None:
        self._costs = costs
        self.alive = torch.ones(len(costs), dtype=torch.bool, device=costs.device)

    def costs(self) -> Tensor:
        """See `Elimination.costs`."""
        return torch.where(self.alive, self._costs, torch.inf)

    def drop(self, channels: Tensor, adapt: bool = True) -> None:
        """Remove channels."""
        self.alive[channels] = False


def give_up_together(readers: Sequence[Elimination | Summation], kept: int) -> Tensor:
    """Drop channels that all `readers` lose at once, those first whose loss costs them least in sum, until `kept` are
    left. Returns those that went, in their order. Where one of the readers is `LARGE`, see `elimination_order`.
    """
    alive = readers[0].alive
    gone = [alive.new_empty(0, dtype=torch.long)]
    while (surplus := int(alive.sum()) - kept) > 0:
        count = min(surplus, *map(_at_once, readers))
        costs = torch.stack([reader.costs() for reader in readers]).sum(0)
        gone.append(costs.argsort(stable=True)[:count])
        for reader in readers:
            reader.drop(gone[-1], adapt=count < surplus)
    return torch.cat(gone)


def _choose(inverse: Tensor, cross: Tensor, labels: Labels, area: int, kept: int, form: Form) -> Mask:
    """The first half-step: the channels, or blocks of them, that each group keeps, `(n, D / area)` bool."""
    members = [torch.from_numpy(np.flatnonzero(labels == group)) for group in range(int(labels.max()) + 1)]
    eliminations = [Elimination(inverse, cross[filters.to(cross.device)], area) for filters in members]
    return _deal(eliminations, kept) if form == "partition" else _eliminate(eliminations, kept)


def _eliminate(eliminations: Sequence[Elimination], kept: int) -> Mask:
    """Overlap form: each group drops the channels that cost it least. `(n, C)` bool."""
    for group in eliminations:
        give_up_together([group], kept)
    return np.stack([group.alive.cpu().numpy() for group in eliminations])


def _deal(eliminations: Sequence[Elimination], kept: int) -> Mask:
    """Partition form: the groups drop channels together, until each channel has one reader. `(n, C)` bool."""
    alive = np.stack([group.alive.cpu().numpy() for group in eliminations])
    while True:
        costs = torch.stack([group.costs() for group in eliminations]).cpu().numpy()
        drops: list[list[int]] = [[] for _ in eliminations]
        quota = _at_once(eliminations[0])
        for place in np.argsort(costs, axis=None, kind="stable"):
            group, channel = divmod(int(place), costs.shape[1])
            if quota and alive[group, channel] and alive[:, channel].sum() > 1 and alive[group].sum() > kept:
                alive[group, channel] = False
                drops[group].append(channel)
                quota -= 1
        if not any(drops) or alive.sum() == alive.shape[1]:
            break
        for elimination, channels in zip(eliminations, drops, strict=True):
            if channels:
                elimination.drop(torch.tensor(channels, device=elimination.alive.device))
    if alive.sum() > alive.shape[1]:  # three groups or more may block each other: deal out by the costs reached
        worth = np.where(alive, np.where(np.isfinite(costs), costs, 0), -costs[np.isfinite(costs)].max())
        dealt = assign_balanced(worth.T, np.arange(alive.shape[1]) * len(alive) // alive.shape[1])
        alive = np.equal.outer(np.arange(len(alive)), dealt)
    return alive


def damped_inverse(gram: Tensor) -> Tensor:
    """The inverse of a Gram matrix `(D, D)`, see `DAMPING`: float64, or float32 above `LARGE` inputs."""
    return _inverse(_damped(gram))


def _damped(gram: Tensor) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * float(gram.diagonal().mean()) or 1.0)
    return damped


def _inverse(damped: Tensor) -> Tensor:
    if len(damped) > LARGE:
        factor, failed = torch.linalg.cholesky_ex(damped.float())
        if not int(failed):
            return torch.cholesky_inverse(factor)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _at_once(group: Elimination | Summation) -> int:
    left = int(group.alive.sum())
    return left if group.inputs > LARGE else max(1, int(BATCH * left))
