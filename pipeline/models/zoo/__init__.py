"""Architectures: one file each, from a library or from its paper."""
