"""A share of the time as a budget.

`table` is how long layers take, by their groups and by their width (`grid`); `measure` makes it, layer by layer in
PyTorch or in a runtime (`layers`), with what is `wanted` for a request. `budget` chooses kernels that meet a share of
the time by it, `filters` filters; the whole `network` has the last word (`meeting`).
"""
