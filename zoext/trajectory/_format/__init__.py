"""The file format of a trajectory: JSON lines, each with a checksum, and a side file for bases."""
