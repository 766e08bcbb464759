"""The stages on Ray Data. Beside `trainer.py` and `jobs/`, the only place that imports ray."""
