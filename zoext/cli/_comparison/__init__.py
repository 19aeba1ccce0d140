"""The comparison of optimizers: which runs it needs, one run, its records, and the report."""
