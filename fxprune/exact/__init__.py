"""All that follows the one lossy step, and is exact: passes in order, the rewrite, the check, the account, the file.

`pipeline` runs the passes, `rewriting` is `fxprune.rewrite`, `verification` compares two models in a `precision`,
`reporting` says what became of each layer, `record` is what a compiled module remembers, `storage` saves and loads it.
"""
