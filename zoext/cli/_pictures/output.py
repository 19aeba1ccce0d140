"""What a picture leaves: its file, its numbers and lines on the terminal."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli import _json
from zoext.cli._errors import UserError, writing

#: The formats of a picture, and the entry of its metadata that would make two equal pictures differ.
_DATES = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}
FORMATS = tuple(_DATES)

_DOTS_PER_INCH = 200


@dataclass(frozen=True)
class Output:
    """The files ``FOLDER/NAME.FORMAT``, with the picture, and ``FOLDER/NAME.json``, with its numbers."""

    name: str
    folder: Path
    format: str
    overwrite: bool
    quiet: bool

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.name}.{self.format}"

    @property
    def numbers(self) -> Path:
        return self.folder / f"{self.name}.json"

    def check_free(self) -> None:
        """Raises a UserError if a file would be replaced without ``overwrite``."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: is not a folder; give another name")
        for path in (self.picture, self.numbers):
            if path.is_dir():
                raise UserError(f"--out {self.folder}: {path} is a folder; give another --out")
            if path.exists() and not self.overwrite:
                raise UserError(f"--out {self.folder}: {path} exists; give --overwrite or another --out")

    def write(self, figure: Any, numbers: Any) -> None:
        """Writes the picture, and the ``numbers`` as JSON, in which those that are not finite are null."""
        drawn = io.BytesIO()
        figure.savefig(drawn, format=self.format, dpi=_DOTS_PER_INCH, metadata={_DATES[self.format]: None})
        text = _json.text_of(numbers) + "\n"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.picture):
            self.picture.write_bytes(drawn.getvalue())
        with writing(self.numbers):
            atomic.write_text(self.numbers, text)

    def say(self, text: str) -> None:
        """Prints ``text`` unless ``quiet``."""
        if not self.quiet:
            print(text, flush=True)
