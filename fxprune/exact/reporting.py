"""What became of each convolution, in numbers: form, groups, filters, ratio, parameters, multiply-accumulates, and the
gathers that remain.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, fx

from fxprune.calibration.agreement import Agreement
from fxprune.graph.convolutions import Convolution, convolutions
from fxprune.graph.costs import batch_size, known_sum, layer_costs, total_macs
from fxprune.graph.editing import KEPT_BECAUSE, RUN, calls
from fxprune.graph.layers import ChannelGather
from fxprune.passes.align_windows import runs
from fxprune.plans import PrunePlan, RemovedChannels
from fxprune.tables import Bar, Cell, Column, Table, Tabular


@dataclass(frozen=True)
class LayerReport:
    """One convolution.

    Attributes:
        name: module path.
        form: `"partition"` or `"overlap"` if kernels went and it is grouped; `"filters"` if only whole filters or input
            channels went; `"branch"` if it went with its residual branch; `"dense"` if it was left alone.
        groups: number of groups.
        asked_ratio, reached_ratio: share of kernel groups removed (from the channels that are left, if filters went
            too), as asked and as rounding to whole channels allows. In the form `"filters"` the share of filters;
            `asked_ratio` is None where nothing was asked, as in a depthwise convolution that follows another.
        params_dense, params: parameters of the layer before and after.
        macs_dense, macs: multiply-accumulates of one image before and after; None if shapes are unknown.
        reason: why it was left dense, or why none of its own filters went; empty if all was done that was asked.
        redundancy: share of its kernel groups, or filters, that resemble another, if the planner looked for them
            (`variety=`).
        error: squared error of its output on the calibration data, relative to the variance of what the dense network
            gives there; None without calibration.
        block_cost: share of the importance that the same groups could keep, but for the blocks of channels (`block=`);
            None if channels are kept one by one.
        filters_dense, filters: filters before and after; None if the graph does not call the layer.
    """

    name: str
    form: str
    groups: int
    asked_ratio: float | None
    reached_ratio: float
    params_dense: int
    params: int
    macs_dense: int | None
    macs: int | None
    reason: str
    redundancy: float | None = None
    error: float | None = None
    block_cost: float | None = None
    filters_dense: int | None = None
    filters: int | None = None


@dataclass(frozen=True)
class GatherReport:
    """One gather that remains at run time.

    Attributes:
        name: module path.
        channels: number of channels it writes.
        reason: why it could not vanish.
        runs: number of maximal stretches of consecutive ascending channels in its index: one for each window it copies.
        bytes: what it writes for one image, over all calls, in the dtype of the model; None if shapes are unknown. It
            reads as much again.
    """

    name: str
    channels: int
    reason: str
    runs: int
    bytes: int | None


@dataclass(frozen=True, repr=False)
class Report(Tabular):
    """The account of a compiled model. `str()` is a summary and a table, a notebook shows it with bars, `to_markdown()`
    is for an issue or a README; `describe(gathers=True)` lists the gathers too; `to_dict()` is JSON-able.

    Attributes:
        layers: every convolution, in model order.
        gathers: the gathers that remain, in graph order.
        gathered_bytes: what they write for one image; None if shapes are unknown.
        params_dense, params_pruned: parameters of the whole model, as far as forward uses them.
        macs_dense, macs_pruned: multiply-accumulates of all convolutions and linear layers for one image; None if
            shapes are unknown.
        input_shapes: shapes of the inputs that the MACs are counted for, batch included.
        notes: what else the user should know.
        agreement: how far the pruned network and the dense one agree, on inputs that were held out where there are
            enough, see `fxprune.calibration.agreement`. It is of the refit: what is trained afterwards is not in it.
            None without calibration data, where the outputs cannot be compared, and in a graph that was loaded.
    """

    layers: tuple[LayerReport, ...]
    gathers: tuple[GatherReport, ...]
    gathered_bytes: int | None
    params_dense: int
    params_pruned: int
    macs_dense: int | None
    macs_pruned: int | None
    input_shapes: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    agreement: Agreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Report":
        """Undo `to_dict`, JSON in between or not."""
        return cls(
            **{
                **found,
                "layers": tuple(LayerReport(**layer) for layer in found["layers"]),
                "gathers": tuple(GatherReport(**gather) for gather in found["gathers"]),
                "input_shapes": tuple(tuple(shape) for shape in found["input_shapes"]),
                "notes": tuple(found["notes"]),
                "agreement": Agreement(**told) if (told := found.get("agreement")) else None,
            }
        )

    @property
    def rewritten(self) -> int:
        """Number of convolutions that became grouped or narrower, or went with a branch."""
        return sum(layer.form != "dense" for layer in self.layers)

    @property
    def is_narrower(self) -> bool:
        """Whether filters or branches are gone, so that the masked network, too, is smaller than the model was."""
        return any(layer.form in ("filters", "branch") or layer.filters != layer.filters_dense for layer in self.layers)

    def _summary(self) -> str:
        """How many convolutions were rewritten, and what a ratio is the share of."""
        gone = [layer for layer in self.layers if layer.form == "branch"]
        if gone:
            rest = replace(self, layers=tuple(layer for layer in self.layers if layer not in gone))
            branches = len({layer.reason for layer in gone})
            said = f"{branches} residual branches went, with {len(gone)} layers"
            return f"{said}; {rest._summary()}" if rest.rewritten else f"{said}; all others stay as they are"
        narrower = sum(layer.form == "filters" for layer in self.layers)
        of = f"of {len(self.layers)} convolutions"
        if not narrower:
            return f"{self.rewritten} {of} grouped; the ratio is the share of kernel groups removed from each of these"
        if narrower == self.rewritten:
            return f"{narrower} {of} lost filters or input channels; the ratio is the share of filters removed"
        return (
            f"{self.rewritten - narrower} {of} grouped, {narrower} others lost filters or input channels; the ratio is "
            "the share of kernel groups removed from what the filters left, of these others that of filters"
        )

    def brief(self) -> str:
        """What is in it, in a few words."""
        return (
            f"{self.rewritten} of {len(self.layers)} convolutions smaller, parameters "
            f"{_change(self.params_dense, self.params_pruned)}, MACs {_change(self.macs_dense, self.macs_pruned)}"
            + (f", {self.agreement.share:.1%} agreement" if self.agreement else "")
        )

    def describe(self, *, gathers: bool = False, width: int | None = None) -> str:
        """Return the report as text.

        Args:
            gathers: list the gathers that remain, one a line.
            width: of a line in characters, at most; None for any.
        """
        text = self.table().text(width)
        if not gathers or not self.gathers:
            return text
        return f"{text}\n\n{self._gather_table().text(width)}"

    def table(self) -> Table:
        """One line for each convolution, after a summary."""
        extra = [
            name
            for name in ("redundancy", "error", "block_cost")
            if any(getattr(layer, name) is not None for layer in self.layers)
        ]
        narrower = any(layer.filters != layer.filters_dense for layer in self.layers)
        columns = (
            Column("convolution", right=False),
            Column("form", right=False),
            Column("groups"),
            *((Column("filters"),) if narrower else ()),
            Column("asked", goes=4),
            Column("reached", goes=1),
            Column("params", goes=3),
            Column("MACs", goes=2),
            *(Column(name.replace("_", " "), goes=1) for name in extra),
            Column("", right=False),
        )
        shapes = ", ".join("x".join(map(str, shape[1:])) for shape in self.input_shapes) or "unknown size"
        written = f" and write {_bytes(self.gathered_bytes)} an image" if self.gathers else ""
        before = (
            self._summary(),
            f"parameters  {_change(self.params_dense, self.params_pruned)}"
            f"  ({_share(self.params_dense, self.params_pruned)})",
            f"MACs        {_change(self.macs_dense, self.macs_pruned)}  ({_share(self.macs_dense, self.macs_pruned)}), "
            f"convolutions and linear layers, one image of {shapes}",
            f"gathers     {len(self.gathers)} remain{written}",
            *(f"note: {note}" for note in (*((self.agreement,) if self.agreement else ()), *self.notes)),
        )
        return Table(columns, tuple(self._row(layer, narrower, extra) for layer in self.layers), before)

    def _row(self, layer: LayerReport, narrower: bool, extra: list[str]) -> tuple[Cell, ...]:
        if layer.form in ("dense", "branch"):
            return (layer.name, layer.form, layer.reason)
        return (
            layer.name,
            layer.form,
            str(layer.groups),
            *((_change(layer.filters_dense, layer.filters),) if narrower else ()),
            "" if layer.asked_ratio is None else f"{layer.asked_ratio:.3g}",
            Bar(f"{layer.reached_ratio:.3g}", layer.reached_ratio),
            _remaining(layer.params_dense, layer.params),
            _remaining(layer.macs_dense, layer.macs),
            *(_percent(getattr(layer, name)) for name in extra),
            layer.reason,
        )

    def _gather_table(self) -> Table:
        columns = (Column("gather", right=False), *map(Column, ("bytes", "runs", "channels")), Column("", right=False))
        return Table(
            columns,
            tuple(
                (gather.name, _bytes(gather.bytes), str(gather.runs), str(gather.channels), gather.reason)
                for gather in self.gathers
            ),
        )


def make_report(
    plan: PrunePlan,
    dense: Mapping[str, tuple[int, int | None]],
    gm: fx.GraphModule,
    values: Mapping[fx.Node, Any],
    *,
    errors: Mapping[str, float],
    params_dense: int,
    input_shapes: tuple[tuple[int, ...], ...],
    notes: tuple[str, ...],
    agreement: Agreement | None = None,
) -> Report:
    """Compare a rewritten graph with what it was.

    Args:
        plan: the plan that was applied.
        dense: parameters and MACs of each layer before, by module path (`layer_costs`).
        gm: the rewritten graph, and `values` what its nodes give on meta tensors.
        errors: of each refitted layer.
        params_dense: of the whole graph before.
        input_shapes: shapes that the MACs are counted for.
        notes, agreement: passed on.
    """
    after = layer_costs(gm, values)
    convs = convolutions(gm)
    left = [name for name in dense if name in convs and name not in plan.layers and name not in plan.skipped]
    gone = [name for names in plan.branches.values() for name in names if name in dense]
    layers = []
    for name in [*plan.layers, *plan.skipped, *left, *gone]:
        before_params, before_macs = dense.get(name, (0, None))
        params, macs = (0, 0) if name in gone else after.get(name, (before_params, before_macs))
        layers.append(
            LayerReport(
                name=name,
                params_dense=before_params,
                params=params,
                macs_dense=before_macs,
                macs=macs,
                error=errors.get(name),
                **_became(plan, name, convs.get(name)),
            )
        )
    order = {name: i for i, name in enumerate(dense)}
    layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    return Report(
        layers=tuple(layers),
        gathers=(gathers := _gathers(gm, values)),
        gathered_bytes=known_sum(gather.bytes for gather in gathers),
        params_dense=params_dense,
        params_pruned=sum(p.numel() for p in gm.parameters()),
        macs_dense=total_macs(dense),
        macs_pruned=total_macs(after),
        input_shapes=input_shapes,
        notes=notes,
        agreement=agreement,
    )


def _became(plan: PrunePlan, name: str, conv: Convolution | None) -> dict[str, Any]:
    """What a plan made of a convolution, as fields of its report."""
    for end, names in plan.branches.items():
        if name in names:
            reason = f"goes with the branch that {end} ends"
            return {"form": "branch", "groups": 0, "asked_ratio": None, "reached_ratio": 1.0, "reason": reason}
    kernels, removed = plan.layers.get(name), plan.removed.get(name, RemovedChannels())
    filters = None if conv is None else conv.out_channels
    before = None if filters is None else filters + len(removed.outputs)
    common: dict[str, Any] = {"filters": filters, "filters_dense": before}
    if kernels is not None:
        return common | {
            "form": kernels.form,
            "groups": kernels.groups,
            "asked_ratio": kernels.asked_ratio,
            "reached_ratio": kernels.ratio,
            "reason": "",
            "redundancy": kernels.redundancy,
            "block_cost": kernels.block_cost,
        }
    common["groups"] = 1 if conv is None else conv.groups
    common["reason"] = plan.skipped.get(name, "" if removed.outputs else _why_left(plan))
    if not removed.outputs and not removed.inputs:
        return common | {"form": "dense", "asked_ratio": 0.0, "reached_ratio": 0.0}
    return common | {
        "form": "filters",
        "asked_ratio": removed.asked_ratio,
        "reached_ratio": len(removed.outputs) / before if before else 0.0,
        "redundancy": removed.redundancy,
    }


def _why_left(plan: PrunePlan) -> str:
    """Why a convolution that the plan does not name kept its filters."""
    if plan.removed:
        return "none of its filters was chosen"
    return "it is in no branch that goes" if plan.branches else "the plan does not name it"


def _gathers(gm: fx.GraphModule, values: Mapping[fx.Node, Any]) -> tuple[GatherReport, ...]:
    found: dict[str, GatherReport] = {}
    batch = batch_size(gm, values)
    for node, gather in calls(gm, ChannelGather):
        if node.meta.get(RUN, 0):
            continue  # another run of a recording has the same
        size, name, value = gather.index.numel(), str(node.target), values.get(node)
        reason = node.meta.get(KEPT_BECAUSE, "two channel spaces meet that cannot share an order")
        if not gather.is_permutation:
            reason = f"overlap form: the groups read {size} channels out of {gather.in_channels}"
        written = value.numel() * value.element_size() // batch if isinstance(value, Tensor) else None
        first = found.setdefault(name, GatherReport(name, size, reason, runs(gather.index), 0))
        found[name] = replace(first, bytes=known_sum((first.bytes, written)))
    return tuple(found.values())


def _change(before: int | None, after: int | None) -> str:
    return "unknown" if before is None or after is None else f"{_short(before)} -> {_short(after)}"


def _remaining(before: int | None, after: int | None) -> Cell:
    """A change, with the share that remains as a bar."""
    text = _change(before, after)
    return text if not before or after is None else Bar(text, after / before)


def _share(before: int | None, after: int | None) -> str:
    return "unknown" if not before or after is None else f"{100 * after / before:.1f} % remain"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _bytes(count: int | None) -> str:
    return "unknown bytes" if count is None else f"{_short(count)}{'' if count >= 1000 else ' '}B"


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size * (0.9995 if size > 10**3 else 1):  # 999,500 is 1 M, not 1e+03 k
            return f"{count / size:.3g} {unit}"
    return str(count)
