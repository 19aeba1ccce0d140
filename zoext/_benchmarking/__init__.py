"""What ``zoext bench`` and the programs in ``benchmarks/`` measure with."""
