"""Shared utilities: signals, profiler events, random number generators, atomic files."""
