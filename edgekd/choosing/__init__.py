"""Which student, with which settings: candidates at a budget, sweeps off one cache, what a run will cost."""
