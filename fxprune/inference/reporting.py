"""The account of an acceleration: what was tried for each convolution, how long it took, and what was chosen."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fxprune.exact.reporting import Report
from fxprune.tables import Bar, Cell, Column, Table, Tabular


@dataclass(frozen=True)
class LayerChoice:
    """One convolution with what is fused into it.

    Attributes:
        name: module path in the pruned model.
        input_shape: `(N, C, H, W)` it was timed with.
        chosen: the fastest form, a key of `seconds`.
        seconds: shortest time of each form that was tried. A form is `"pruned"` or `"dense"` and the engine: `"pruned
            native"`; in ONNX Runtime and OpenVINO it is `"pruned grouped"`, `"pruned split"` or `"dense conv"`, timed
            between two convolutions that pass each channel on, so that changes of layout count. A convolution that was
            not pruned has dense forms only.
        obstacles: engines that cannot compute it, with the reason.
    """

    name: str
    input_shape: tuple[int, ...]
    chosen: str
    seconds: Mapping[str, float]
    obstacles: Mapping[str, str]

    def of(self, form: str) -> "LayerChoice":
        """The same with another form chosen."""
        return replace(self, chosen=form)

    @property
    def dense_form(self) -> str:
        """The fastest dense form."""
        return min((form for form in self.seconds if form.startswith("dense")), key=self.seconds.__getitem__)

    @property
    def dense_seconds(self) -> float:
        """Time of the fastest dense form."""
        return self.seconds[self.dense_form]


@dataclass(frozen=True, repr=False)
class AccelerationReport(Tabular):
    """The account of an accelerated model. `str()` is a table, in notebooks one with bars; `to_dict()` is JSON-able.

    Attributes:
        device, dtype, memory_format: what the model was made for. The format is that of PyTorch; `"own"` in runtimes
            that choose it themselves.
        chosen: the whole graph that was chosen, a key of `seconds`.
        seconds: shortest time of each whole graph that was tried: `"pruned"` or `"dense"` and the memory format in
            PyTorch, or the runtime.
        relative: time of the chosen graph relative to the best dense one *of the network that was accelerated*: the
            quotient of the shortest times; 1 if that is the choice. Where only kernels went that is the time of the
            model before pruning. Filters and branches are gone from the dense form, too: of these networks it says what
            their groups gain, and nothing of what pruning gained, see `opponent`.
        layers: the convolutions, in graph order.
        gathers: gathers that no convolution could take in.
        difference: largest difference to the model before, relative to the largest output.
        notes: what else the user should know.
        compiled: the report of the pruned model; None if the model was not compiled.
        runtime: what computes the chosen graph, see `fxprune.accelerate`.
        absent: runtimes that were asked for and did not race, with the reason and what to install.
        spread: of the times of each whole graph, the distance between their first and third quartile.
    """

    device: str
    dtype: str
    memory_format: str
    chosen: str
    seconds: Mapping[str, float]
    relative: float
    layers: tuple[LayerChoice, ...]
    gathers: int
    difference: float
    notes: tuple[str, ...]
    compiled: Report | None
    runtime: str = "torch"
    absent: Mapping[str, str] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers."""
        return asdict(self)

    def brief(self) -> str:
        """What is in it, in a few words."""
        where = f"{self.dtype} on {self.device}, {self.memory_format}"
        if self.is_narrower and self.relative == 1:
            return f"{self.chosen}, which is narrower than the model before pruning; {where}"
        return f"{self.chosen}, {self.relative:.2f} of {self.opponent}; {where}"

    @property
    def is_narrower(self) -> bool:
        """Whether filters or branches went, so that no form that raced takes as long as the model before pruning."""
        return self.compiled is not None and self.compiled.is_narrower

    @property
    def opponent(self) -> str:
        """What `relative` is the share of, in words."""
        return "the time of its narrower network without groups" if self.is_narrower else "the best dense time"

    def _absent_original(self) -> tuple[str, ...]:
        """That the model before pruning did not race, where something else might be taken for it."""
        if not self.is_narrower:
            return ()
        assert self.compiled is not None
        before, after = self.compiled.macs_dense, self.compiled.macs_pruned
        share = f", with {after / before:.0%} of its multiply-accumulates" if before and after is not None else ""
        return (
            f"the model before pruning did not race: filters or branches are gone from every form{share}; time "
            "fxprune.accelerate(model, x) beside it, or use fxprune compile --bench",
        )

    def table(self) -> Table:
        """One line for each convolution, after the times of the whole network."""
        columns = (
            Column("convolution", right=False),
            Column("chosen", right=False),
            Column("ms"),
            Column("dense ms", goes=2),
            Column("ratio"),
            Column("tried (ms)", right=False, goes=1),
        )
        rows: list[tuple[Cell, ...]] = []
        for layer in self.layers:
            seconds = layer.seconds[layer.chosen]
            tried = ", ".join(f"{form} {1e3 * time:.3f}" for form, time in layer.seconds.items())
            ratio = seconds / layer.dense_seconds
            cells = (f"{1e3 * seconds:.3f}", f"{1e3 * layer.dense_seconds:.3f}", Bar(f"{ratio:.2f}", ratio), tried)
            rows.append((layer.name, layer.chosen, *cells))
        whole = ", ".join(
            f"{name} {1e3 * seconds:.2f} ms"
            + (f" (spread {1e3 * self.spread[name]:.2f})" if name in self.spread else "")
            for name, seconds in self.seconds.items()
        )
        before = (
            f"chosen: {self.brief()}; {self.gathers} gathers remain",
            f"whole network, shortest times: {whole}",
            f"largest difference to the model before: {self.difference:.1e} of the largest output",
            *self._absent_original(),
            *(f"not in the race: {name}: {reason}" for name, reason in self.absent.items()),
            *(f"note: {note}" for note in self.notes),
        )
        return Table(columns, tuple(rows), before)
