"""Encoders of images and point clouds."""
