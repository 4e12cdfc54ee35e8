"""Parts as training reads them, and all that makes, shows and exports them.

manifest, sample, shards, splits                          a prepared dataset
order, packing, examples, collate, feed, loader           from its samples to a step's packs
prepare, synth, writing                                   making one
inspect, export                                           looking at it, taking parts out
"""
