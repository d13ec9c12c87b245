"""The names that arguments and options take, as types: a type checker finds a misspelt one, and the command line can
offer them without importing what they stand for. What a name means is said where it is used.
"""

from typing import Literal, TypeAlias

Form: TypeAlias = Literal["partition", "overlap"]
"""Of a grouped convolution, see `fxprune.plans`."""
FormChoice: TypeAlias = Literal["auto", "partition", "overlap"]
Target: TypeAlias = Literal["cpu", "cuda"]
"""Kinds of device that a plan can be made for."""
Granularity: TypeAlias = Literal["kernel", "filter"]
"""What is removed: kernels, so that convolutions become grouped, or whole filters, so that they become narrower."""
GranularityChoice: TypeAlias = Literal["kernel", "filter", "branch", "auto"]
"""`"branch"` removes whole residual branches; `"auto"` divides a budget among all."""
Scope: TypeAlias = Literal["local", "global"]
Method: TypeAlias = Literal["auto", "cocluster", "reconstruction", "tmi", "srgkp"]
"""How groups and kept kernels are chosen, see `fxprune.planning.METHODS`."""
CriterionName: TypeAlias = Literal["l1", "l2", "random", "movement", "magnitude_increase", "activation"]
"""Of `fxprune.criteria.CRITERIA`."""
CriterionChoice: TypeAlias = Literal[
    "l1", "l2", "random", "movement", "magnitude_increase", "activation", "reconstruction"
]
"""The last is of filters alone, by the error that the refit leaves."""
VarietyName: TypeAlias = Literal["pairs", "pairs-pure", "soft"]
"""Of `fxprune.criteria.variety.VARIETIES`."""
Output: TypeAlias = Literal["auto", "graph", "module"]
"""What becomes of the model: a graph, its own class with smaller layers, or whichever is right."""
AugmentName: TypeAlias = Literal["flip", "crop", "flip+crop"]
"""Of `fxprune.calibration.augmentation.AUGMENTATIONS`."""
PruningSchedule: TypeAlias = Literal["one-shot", "iterative", "agp", "one-cycle"]
"""Of `fxprune.training.schedules.SCHEDULES`."""
RateSchedule: TypeAlias = Literal["constant", "step", "cosine", "onecycle"]
"""Of the learning rate, see `fxprune.training.recipe.SCHEDULES`."""
Amp: TypeAlias = Literal["bf16", "fp16"]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
Layout: TypeAlias = Literal["contiguous", "channels_last"]
BenchRuntime: TypeAlias = Literal[
    "eager", "compile", "script", "accelerate", "accelerate+script", "cudagraph", "max-autotune+cudagraph",
    "accelerate+cudagraph", "onnxruntime", "openvino",
]  # fmt: skip
"""Of `fxprune.comparison.runtimes.RUNTIMES`."""
GraphRuntime: TypeAlias = Literal["inductor", "onnxruntime", "openvino", "tensorrt"]
"""What computes a whole network in place of PyTorch."""
RuntimeName: TypeAlias = Literal["auto", "torch", "inductor", "onnxruntime", "openvino", "tensorrt"]
"""Of `fxprune.accelerate`, see `fxprune.inference.runtimes.RUNTIMES`."""
Precision: TypeAlias = Literal["int8", "bfloat16"]
"""Lower than that of the model, for the runtimes in `fxprune.inference.runtimes.precisions.LESS_PRECISE`."""
Rival: TypeAlias = Literal["dense", "filters", "torch-pruning"]
ComparedMethod: TypeAlias = Literal[
    "dense", "tmi", "tmi-refit", "srgkp", "srgkp-refit", "fxprune", "fxprune-8", "filters", "filters-refit", "pairs",
    "pairs-pure", "filters-error", "combined", "branches", "auto", "fxprune-8-recovered", "filters-error-recovered",
    "branches-recovered", "auto-recovered", "tp-magnitude", "tp-magnitude-recovered", "tp-fpgm", "tp-taylor",
]  # fmt: skip
"""Of `fxprune.comparison.methods.METHODS`."""
