"""Designs, from files, texts or datasets, as files for other programs."""
