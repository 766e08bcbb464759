"""One file per family of losses; each loss is a sum and what it is divided by (`term.py`)."""
