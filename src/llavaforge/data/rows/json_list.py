"""A JSON list of any size, an element at a time, as text.

Comes in: an open text file. Goes out: the text of each element, as it stands. Memory
holds a chunk of the file, or one element if that is longer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

from llavaforge.errors import UserError

CHUNK_CHARACTERS = 4 << 20  # characters read at a time
LONGEST_ROW = 256_000_000  # characters: rows may hold images as base64
_LONGEST_TOKEN = 16  # characters of `-Infinity`, of `\ud83d\ude00`: what may be cut at the end of a chunk


class JsonList:
    """Iterates over the elements of a JSON list as text, reading a chunk at a time."""

    def __init__(self, path: Path, text: IO[str], start: str) -> None:
        self._path, self._text = path, text
        self._buffer, self._position = start, 0
        self._line, self._column = 1, 1  # of the buffer's first character
        self._decoder = json.JSONDecoder()
        self._at_end = False

    def __iter__(self) -> Iterator[str]:
        if (first := self._next_character()) != "[":
            kind = "an empty file" if not first else "something else"
            raise UserError(f"{self._path}: expected a JSON list of rows, found {kind}.")
        self._position += 1
        at_end = self._next_character() == "]"
        while not at_end:
            self._next_character()
            end = self._end_of_element()
            yield self._buffer[self._position : end]
            self._position = end
            separator = self._next_character()
            if separator not in (",", "]"):
                self._fail("expecting ',' or ']' after a row", self._position)
            at_end = separator == "]"
            self._position += not at_end
        self._position += 1
        if self._next_character():
            self._fail("extra data after the list", self._position)

    def _end_of_element(self) -> int:
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _LONGEST_TOKEN
                if not cut_off or not self._read_more():
                    self._fail(error.msg, error.pos)
            except (RecursionError, ValueError) as error:  # nested too deeply; a number of more than 4,300 digits
                self._fail(str(error), self._position)
            else:
                if end < len(self._buffer) - _LONGEST_TOKEN or not self._read_more():  # a number could go on
                    return end

    def _next_character(self) -> str:
        """Skip white space; return the character there, or an empty text at the end."""
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        if self._at_end:
            return False
        if len(self._buffer) - self._position > LONGEST_ROW:
            self._fail(f"a row of over {LONGEST_ROW:,} characters", self._position)
        more = self._text.read(max(CHUNK_CHARACTERS, len(self._buffer) - self._position))
        if not more:  # the buffer stays as it is: a caller holds positions in it
            self._at_end = True
            return False
        self._line, self._column = self._line_and_column(self._position)
        self._buffer = self._buffer[self._position :] + more
        self._position = 0
        return True

    def _line_and_column(self, position: int) -> tuple[int, int]:
        """Return line and column, from 1, of a position in the buffer."""
        num_lines = self._buffer.count("\n", 0, position)
        if not num_lines:
            return self._line, self._column + position
        return self._line + num_lines, position - self._buffer.rfind("\n", 0, position)

    def _fail(self, message: str, position: int) -> NoReturn:
        line, column = self._line_and_column(position)
        raise UserError(
            f"{self._path}:{line}:{column}: malformed JSON: {message.replace('starting at', 'not closed')}. "
            "Mend that place (a cut-off download ends in the middle of a row)."
        )
