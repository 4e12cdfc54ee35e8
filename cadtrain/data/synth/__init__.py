"""Procedural parts with true captions, as many as wanted, each fixed by (seed, index) alone."""
