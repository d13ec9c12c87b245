"""One budget over filters, kernels and branches as one integer program.

`planner` writes it from what was measured and makes a plan of its solution. `terms` say what each choice loses and
costs in a layer; `kernel_ways` are the choices of kernels, and `interaction` is what these lose where inputs are gone.
`integer_program` solves it; `selected_plans` turn a choice into plans.
"""
