"""Measured configurations: tuned tables, the search that fills them, and the choice of one."""
