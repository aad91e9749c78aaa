"""Rows of datasets as other programs write and read them: OpenAI's, TRL's and Axolotl's JSONL."""

from rollout.formats.names import FORMATS, IMPORTED, Format
from rollout.formats.reading import Imported, read_rows
from rollout.formats.writing import write_rows

__all__ = ["FORMATS", "IMPORTED", "Format", "Imported", "read_rows", "write_rows"]
