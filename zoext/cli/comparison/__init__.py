"""What ``zoext compare`` is made of: which runs, one run, its records, the table and the picture."""
