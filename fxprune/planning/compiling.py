"""From a request to a small network, as one run: plan, mask and refit, rewrite, recover, tell, verify."""

from dataclasses import dataclass, replace

from torch import nn

from fxprune.calibration.agreement import AGREEMENT
from fxprune.calibration.subject import Subject
from fxprune.errors import PoorAgreementWarning, warn_user
from fxprune.exact.record import keep_record, record_of
from fxprune.exact.rewriting import rewritten
from fxprune.exact.verification import Verification, verify
from fxprune.planning.estimates import PLAN, REFIT
from fxprune.planning.lossy import masked_by, recovered_by, tell_agreement, way_out
from fxprune.planning.making import noted_as_baked, plan_for
from fxprune.planning.requests import AUTO, Request
from fxprune.plans import PrunePlan


@dataclass(frozen=True)
class Compiled:
    """What came of a request.

    Attributes:
        plan: what was pruned.
        masked: the dense model in which that is zero.
        pruned: the small network.
        check: that both compute the same; None if it was not asked for.
    """

    plan: PrunePlan
    masked: nn.Module
    pruned: nn.Module
    check: Verification | None


def compiled_for(
    subject: Subject,
    request: Request,
    *,
    computed: tuple[str, ...] = (),
    fold_batch_norm: bool = False,
    check: bool | None = None,
) -> Compiled:
    """Compile a model. What it will take in all is said beforehand.

    Args:
        subject: the model, with what it was given.
        request: what is asked for.
        computed: convolutions whose weights were computed, see `fxprune.planning.making.noted_as_baked`.
        fold_batch_norm: see `fxprune.compile`.
        check: whether the result is verified; None if there are examples.

    Raises:
        FxpruneError: see `fxprune.compile`.

    Warns:
        PoorAgreementWarning: see `fxprune.compile`.
    """
    progress = request.progress
    plan, masked = plan_for(subject, request, alone=False)
    plan = noted_as_baked(plan, computed)
    if masked is None:
        subject.begin(PLAN if request.granularity == AUTO else REFIT)
        masked = masked_by(subject, plan, progress=progress)
    pruned = _rewritten(subject, plan, masked, fold_batch_norm)
    if (followed := record_of(pruned).plan) != plan:  # some layers of the user's own module have to stay dense
        plan, masked = followed, masked_by(subject, followed, progress=progress)
        pruned = _rewritten(subject, plan, masked, fold_batch_norm)
    if request.recovery is not None:
        masked = recovered_by(subject, masked, plan, request.recovery, seed=request.seed, progress=progress)
        pruned = _rewritten(subject, plan, masked, fold_batch_norm)
        found = getattr(masked, AGREEMENT, None)
        if found is not None and found.is_poor:
            warn_user(f"{found}; {way_out(plan, recovered=True)}", PoorAgreementWarning)
    else:
        record = record_of(pruned)
        agreement = tell_agreement(subject, plan, masked, progress=progress)
        subject.finish()
        keep_record(pruned, replace(record, report=replace(record.report, agreement=agreement)))
    checked = None
    if check or (check is None and subject.examples):
        checked = verify(pruned, masked, list(subject.examples))
    return Compiled(plan, masked, pruned, checked)


def _rewritten(subject: Subject, plan: PrunePlan, masked: nn.Module, fold_batch_norm: bool) -> nn.Module:
    return rewritten(masked, plan, subject.captured(masked), fold_batch_norm=fold_batch_norm)
