"""Where samples come from: one file per format, each a plan of units and a reader of one unit."""
