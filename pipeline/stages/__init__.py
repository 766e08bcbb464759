"""Labelling without Ray: decode, prepare, batch, predict, tile, encode, and the worker that runs them as one stream."""
