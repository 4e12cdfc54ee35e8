"""Stored outputs of frozen encoders: what they are of, how they lie on the disk, reading and writing them."""
