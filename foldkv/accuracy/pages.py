"""The files of a report: each appears whole or not at all, and pages of one folder link to each other."""

from __future__ import annotations

import os
import re
from pathlib import Path

PAGES = {"report.html": "Accuracy of the whole model", "ops.html": "The attention ops alone"}
"""Pages that may lie in one folder, and what the others call them."""

BESIDE = re.compile("<!-- beside -->.*?<!-- /beside -->", re.DOTALL)
"""Where a page (templates/page.html.j2) names the others."""


def write_files(directory: str | os.PathLike[str], contents: dict[str, str]) -> list[Path]:
    """Write texts into `directory`, made if missing; then link its pages, those of earlier runs too."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_write(folder / name, text) for name, text in contents.items()]
    pages = [name for name in PAGES if (folder / name).is_file()]
    for name in pages:
        links = " · ".join(f'<a href="{other}">{PAGES[other]}</a>' for other in pages if other != name)
        before = (folder / name).read_text(encoding="utf-8")
        after = BESIDE.sub(f"<!-- beside -->{links}<!-- /beside -->", before, count=1)
        if after != before:
            _write(folder / name, after)
    return written


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
