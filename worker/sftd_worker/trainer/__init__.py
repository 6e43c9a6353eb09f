"""The training core: one run, from `job.json` to `results/`. `train.py` reads from top to bottom.

It knows files and signals only: no HTTP of ours, no database. `python -m sftd_worker.trainer WORKDIR` runs it.
"""
