"""Measured configurations: their tables, the search that fills them, the choice when compiling."""
