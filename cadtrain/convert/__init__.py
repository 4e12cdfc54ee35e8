"""`cadtrain convert`: any checkpoint of a run to one file of weights or to a Hugging Face folder.

DeepSpeed's shards are read by `checkpoint.zero_shards`, one weight at a time and without running code from them.
"""
