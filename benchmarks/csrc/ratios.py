"""The speed of every loop as a multiple of its scalar form, and of a plain copy at the same place.

Reads what ``make bench-cpp`` writes with ``--benchmark_out=FILE``; standard library only. Ratios are taken
within a repetition, and their median is printed with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

Rates = dict[str, dict[int, float]]  # of a benchmark, repetition by repetition


def read(path: Path, counter: str) -> Rates:
    """The rates that ``counter`` holds, of the benchmarks that have it."""
    rates: Rates = {}
    for run in json.loads(path.read_text())["benchmarks"]:
        if run["run_type"] == "iteration" and counter in run:
            rates.setdefault(run["run_name"], {})[run.get("repetition_index", 0)] = run[counter]
    return rates


def ratio(rates: Rates, name: str, reference: str) -> str:
    """``name`` over ``reference``, or a dash where one was not measured."""
    if name not in rates or reference not in rates:
        return "-"
    values = [rate / rates[reference][repetition] for repetition, rate in rates[name].items()]
    median, smallest, largest = (f"{f(values):.3g}" for f in (statistics.median, min, max))
    return median if len(values) == 1 else f"{median} ({smallest} .. {largest})"


def rows(path: Path) -> list[tuple[str, str, str]]:
    items, byte_rates = read(path, "items_per_second"), read(path, "bytes_per_second")
    table = [("benchmark", "/ scalar", "/ copy")]
    for name in sorted(items):
        *case, instruction_set = name.split("/")
        if f"{'/'.join(case)}/scalar" in items and instruction_set != "scalar":
            scalar = ratio(items, name, f"{'/'.join(case)}/scalar")
            table.append((name, scalar, ratio(byte_rates, name, f"copy/{case[-1]}")))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("figures", type=Path, help="the JSON file of `make bench-cpp`")
    for name, scalar, copy in rows(parser.parse_args(arguments).figures):
        print(f"{name:<48} {scalar:<24} {copy}")


if __name__ == "__main__":
    main()
