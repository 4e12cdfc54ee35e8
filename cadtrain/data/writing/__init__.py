"""How a dataset gets onto the disk, whatever its parts come from: kernel workers, blocks that survive a kill, shards of an array job.

pipeline   inputs in, rows and ledger entries out          blocks, writer   what is finished stays finished
columns    rows as Arrow batches                           finish, merge    blocks made one dataset; repeats left out
costs      what each input took                            share            which blocks one process of many writes
"""
