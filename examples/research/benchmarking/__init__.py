"""What `benchmark.py` measures: models and contenders, time, memory and operators, and the sweep over sizes."""
