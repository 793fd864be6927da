"""Write what a run of the GPU tests found as JSON.

Usage: python tests/gpu/record.py JUNIT_XML OUT_JSON        called by run.sh, where FOLDKV_GPU_RECORD names OUT_JSON
Lines of build/gpu-sanitize.txt go in where they are of the same sources.
"""

from __future__ import annotations

import collections
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from foldkv.bench.result import stamp

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def counts(junit: Path) -> tuple[dict[str, dict[str, int]], float, list[str]]:
    """Outcomes by test file, seconds in all, and the names of what failed."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    files: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
    seconds, failed = 0.0, []
    for suite in suites:
        seconds += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            outcome = next((OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES), "passed")
            files[case.get("classname", "").rpartition(".")[2]][outcome] += 1
            if outcome == "failed":
                failed.append(f"{case.get('classname')}::{case.get('name')}")
    return dict(sorted(files.items())), seconds, failed


def sanitizer_lines(sources: str) -> list[str]:
    """One line a tool, of the last run over these sources; empty where there is none."""
    path = ROOT / "build" / "gpu-sanitize.txt"
    head, *lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else [""]
    return lines if head == f"sources {sources}" else []


def record(junit: Path) -> dict[str, Any]:
    files, seconds, failed = counts(junit)
    words = [sys.executable, str(ROOT / "tools" / "source_hash.py")]
    sources = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    total = {name: sum(one[name] for one in files.values()) for name in ("passed", "failed", "skipped")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    head = stamp(device, "tests/gpu/run.sh")
    head["versions"] |= {"cuda": torch.version.cuda}
    if torch.cuda.is_available():
        head["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return head | {
        "sources": sources,
        "result": ", ".join(f"{number} {name}" for name, number in total.items() if number),
        "seconds": round(seconds, 1),
        "files": files,
        "failed": failed,
        "sanitizer": sanitizer_lines(sources),
    }


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(sys.argv[2])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    print(f"record: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
