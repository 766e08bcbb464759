"""The way back: what people corrected in other tools, as targets that the sources read."""
