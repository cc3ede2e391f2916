"""The parts of compare.py: the data of a run, the methods, one run, the results file, the statistics, the pictures."""
