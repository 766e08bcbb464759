"""The way out of the table: one file per format, pieces of work that know nothing of each other, and one fold."""
