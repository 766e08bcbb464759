"""How fast labelling is beside its limit and beside other tools: one corpus, model and machine for all."""
