"""Tunes launch configs on a GPU: candidates, compiled and read, then checked and timed beside the config of now.

spaces.py says what is tried, plan.py for what and on which cases, compiling.py drops what spills, bench.py times
kernels alone, search.py decides, table.py writes kernels/_measured.py, command.py is `python -m benchmarks tune`.
"""
