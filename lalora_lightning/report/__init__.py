"""Reports of a run: an HTML page, and the table printed after training."""

from lalora_lightning.report.page import figures, main, tables, write_report

__all__ = ["figures", "main", "tables", "write_report"]
