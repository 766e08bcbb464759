"""The registry's entries, a literal table for each family of models."""
