"""All that follows the one lossy step, and is exact: passes in order, the rewrite, the check, the account, the file.

`pipeline` runs the passes, `rewriting` is `fxprune.rewrite`. For a user's own module `narrowing` takes channels out,
`placements` says which layer a gather belongs to, `operating` puts it there, and `surgery` is that as data.
`verification` compares two models in a `precision` and names their `first_difference`; `reporting` says what became of
each layer, `record` is what a compiled model remembers, `storage` saves and loads it.
"""
