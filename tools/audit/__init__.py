"""The audit of an artifact folder as a black box; `cli` is its command and says what it wants.

`run` starts the artifact in clean processes, `tamper` changes its validation data, `shared` is what the checks have in
common. The checks: `causality` (C1 to C4), `package`, `data`, `papers` (with `stats`).
"""
