"""Where predictions come from that are scored: a table of ours, or files that other tools wrote."""
