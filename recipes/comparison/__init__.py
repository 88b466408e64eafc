"""Comparisons of methods: tasks, runs as records in a file of JSON lines, and the tables made from them."""

from recipes.comparison.records import Record, append_record, label, read_records, run_key, run_title
from recipes.comparison.summary import REFERENCE, Row, figures, markdown, summarize, write_csv

__all__ = [
    "REFERENCE",
    "Record",
    "Row",
    "append_record",
    "figures",
    "label",
    "markdown",
    "read_records",
    "run_key",
    "run_title",
    "summarize",
    "write_csv",
]
