"""What every part uses: signals, profiler events, generators, atomic files."""
