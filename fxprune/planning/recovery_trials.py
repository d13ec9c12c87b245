"""Which of several plans is best once it is recovered: the nearest after the refit are recovered for a short time each.

A refit and a recovery do not like the same plans. ResNet-20 at 40 % of the MACs, 256 images (distance on 64 others, the
same on 1,000 test images): the refit has kernels at .204 and filters at .183 (.206 and .211), 100 steps have them at
.158 and .165 (.171 and .183), 300 steps at .143 and .165 (.154 and .172), where kernels agree with the dense network on
85.6 % and filters on 83.8 %.
"""

from collections.abc import Callable, Mapping

from torch import nn

from fxprune.calibration.agreement import Agreement
from fxprune.calibration.judging import Judge
from fxprune.calibration.recovery import Recovery
from fxprune.calibration.subject import Subject
from fxprune.planning.estimates import FINALISTS, JUDGING
from fxprune.planning.lossy import masked_by, trained
from fxprune.plans import PrunePlan

Made = Callable[[Subject], tuple[PrunePlan, nn.Module | None]]
"""Carries a way out for a subject: its plan, and the masked model if it was refitted on the way."""


def recovered_agreements(
    judge: Judge, ways: Mapping[str, Made], refitted: Mapping[str, Agreement | None], recovery: Recovery, seed: int
) -> dict[str, Agreement | None]:
    """What comes of the ways that are nearest after the refit, each recovered for a tenth of what is asked for; on
    inputs that neither was fitted to.

    Args:
        judge: of the model.
        ways: by name.
        refitted: what came of each after the refit.
        recovery: what is asked for.
        seed: of the recovery.

    Raises:
        CalibrationError: see `fxprune.recover`.
    """
    known = {name: found.distance for name, found in refitted.items() if found is not None}
    found: dict[str, Agreement | None] = {}
    judge.fitted.begin(JUDGING)
    for name in sorted(known, key=known.__getitem__)[:FINALISTS]:
        plan, masked = ways[name](judge.fitted)
        if masked is None:
            masked = masked_by(judge.fitted, plan)
        found[name] = judge.agreement(trained(judge.fitted, masked, plan, recovery.tenth(), seed))
    return found
