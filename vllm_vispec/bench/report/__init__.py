"""`vispec bench report`: a run as Markdown and as one HTML page.

`facts` arranges a run's cells, `sections` turns them into blocks of text, tables and charts, and
`markdown` and `html` write blocks down. Neither knows of the others' work.
"""

from vllm_vispec.bench.report.build import ReportFiles, make_report, write_report
from vllm_vispec.bench.report.html import to_html
from vllm_vispec.bench.report.markdown import to_markdown

__all__ = ["ReportFiles", "make_report", "to_html", "to_markdown", "write_report"]
