"""Reports of a run: a page, and the table that is printed after training (:mod:`lalora_lightning.report.console`)."""

from lalora_lightning.report.page import figures, main, tables, write_report

__all__ = ["figures", "main", "tables", "write_report"]
