"""Metric states: values of additive counts, one file per family, that merge exactly in any order and any partition."""
