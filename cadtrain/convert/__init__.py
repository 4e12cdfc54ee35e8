"""`cadtrain convert`: any checkpoint to one file of weights, a Hugging Face folder or a PEFT adapter.

Shards are read by `checkpoint.zero_shards`, a piece of a weight at a time and without running code from them.

    service        finds the checkpoint, verifies it, says what was written
    targets        what is written, by kind: `torch_file`, `model_folder`, `peft_folder`; `description` of the model
    adapters       merges LoRA while the base is read
    verify         compares with the live weights, and reads the result back
    placing        puts the result in place, whole or not at all
"""
