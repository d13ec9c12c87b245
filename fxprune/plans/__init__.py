"""A plan as pure data: what it says of each layer, what shapes it may have, and which weights it makes zero.

`plan` is the data, `fields` checks them; `shapes` are those of grouped convolutions; `eligibility` says which
convolutions may be pruned; `masking` zeroes what is dropped.
"""

from fxprune.plans.plan import GroupedKernels, PrunePlan, RemovedChannels
from fxprune.vocabulary import Form

__all__ = ["Form", "GroupedKernels", "PrunePlan", "RemovedChannels"]
