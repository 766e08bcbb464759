"""Reports: stored rows folded into figures, tables and one HTML page."""
