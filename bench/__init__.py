"""Side by side in one run: llavaforge and the usual way, on the same model and samples.

    parts -> samples -> race (one process per contender, taking turns step by step) -> fairness -> report

`python -m bench.race` (or `make bench`) from the root of the repository.
"""
