"""Pruning and training together: schedules of sparsity, nested plans, masks that hold, lottery tickets, and a training
loop.

Nothing needs the loop: `sparsification` and `tickets` give objects to be called in any. `run` is `fxprune train`, from
images and a model to networks and a log; `loop` trains, `recipe` says how, `data` with what, `processes` with whom, and
`checkpoints` keeps what a run needs to go on.
"""
