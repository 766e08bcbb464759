"""Models: the spec each one fills, the registry of them, weights, and what turns their outputs into predictions."""
