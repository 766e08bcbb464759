"""A page on this machine that shows a table row by row: images under their masks, found by what they hold."""
