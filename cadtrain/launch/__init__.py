"""`cadtrain launch`: plan a run, start its ranks through DeepSpeed's launcher, and look after them.

`plan_launch` decides and writes nothing; `start` makes the run folder, starts the ranks and returns how they ended.
"""
