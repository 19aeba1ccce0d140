"""Draws pictures for a page or a paper, and writes the numbers that they show as JSON.

  functions  optimizers of zoext, gradient descent and Adam on functions of two variables
  slice      the loss of a model and its noise along random directions, and which mu suits it
  curves     the learning curves of any runs of zoext finetune together

zoext visualize PICTURE --help explains a picture and its options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoext.cli._errors import reading, require
from zoext.cli._pictures import curves_command, functions_command, slice_command
from zoext.cli._pictures.output import FORMATS, Output

EXAMPLES = """\
  zoext visualize functions --out pictures --format pdf
  zoext visualize slice --model ./my-causal-lm --data stories.txt --mu 1e-3 --out pictures
  zoext visualize curves runs/reviews runs/reviews-adamezo --out pictures
"""

#: Modules with HELP, ``add_arguments`` and ``draw``; each is described by its docstring.
_PICTURES = {"functions": functions_command, "slice": slice_command, "curves": curves_command}
_OUT = Path("pictures")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a parser for each picture."""
    pictures = parser.add_subparsers(title="pictures", required=True, metavar="PICTURE", dest="picture")
    for name, picture in _PICTURES.items():
        sub = pictures.add_parser(name, help=picture.HELP, description=picture.__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        picture.add_arguments(sub)
        group = sub.add_argument_group("output")
        group.add_argument(
            "--out", type=Path, metavar="DIR", default=_OUT, help=f"the folder to write to (default {_OUT})"
        )
        group.add_argument(
            "--format", choices=FORMATS, default=FORMATS[0], help=f"of the picture (default {FORMATS[0]})"
        )
        group.add_argument(
            "--overwrite", action="store_true", default=False, help="replace this picture if it exists"
        )
        group.add_argument("--quiet", action="store_true", default=False, help="print only errors")


def run(arguments: argparse.Namespace) -> int:
    """Computes and draws the picture, then writes it with its numbers."""
    require(("matplotlib",), "finetune")
    options = vars(arguments)
    name = options.pop("picture")
    output = Output(name, *(options.pop(each) for each in ("out", "format", "overwrite", "quiet")))
    with reading():
        output.check_free()
        _PICTURES[name].draw(output, **options)
    output.say(f"{output.picture}\n{output.numbers}")
    return 0
