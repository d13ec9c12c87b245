"""Pruning and training together: schedules of sparsity, nested plans, masks that hold, and lottery tickets.

No training loop is imposed: `sparsification` and `tickets` give objects to be called in any.
"""
