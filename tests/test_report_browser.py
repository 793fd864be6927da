"""The page in a real browser, where there is one: nothing sticks out at two widths, the answer is on the first screen."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from report_helpers import tiny_model, tiny_scales, token_windows

from foldkv.accuracy import accuracy_report, ops_cases
from foldkv.accuracy.ops_report import ops_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")

WIDTHS = (400, 1100)
# What the page measures of itself, in a frame, as a window is never narrower than 500: its width, the frame's, where the
# question and the last answer are, pictures that came out tiny.
MEASURE = """<script>addEventListener("load", () => {
  const bottom = x => x ? Math.round(x.getBoundingClientRect().bottom) : 0;
  parent.postMessage([document.documentElement.scrollWidth, innerWidth,
    bottom(document.querySelector(".question")), bottom([...document.querySelectorAll(".answers li")].pop()),
    [...document.querySelectorAll("svg")].filter(x => x.getClientRects().length && x.getBoundingClientRect().width < 80).length
  ].join(" "), "*");
});</script></body>"""
FRAME = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", event => { document.body.dataset.sizes = event.data; });
</script><iframe src="%s" width="%d" height="900" style="border: 0"></iframe></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    sizes = {"num_windows": 4, "window_len": 40, "decode_windows": 4, "decode_len": 12, "new_tokens": 4}
    report = accuracy_report(
        model, ["c8", "k8v4", "c4"], token_windows(4, 40, seed=2), scales=tiny_scales(model), **sizes
    )
    folder = tmp_path_factory.mktemp("page")
    report.save(folder)
    return folder / "report.html"


def run(page: Path, *options: str) -> str:
    profile = page.parent / "profile"
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={profile}", "--virtual-time-budget=2000", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_and_the_answer_comes_first(page: Path, width: int) -> None:
    question, answers = measure(page, width)
    assert 0 < question < 300 and question < answers < 900


def measure(page: Path, width: int) -> tuple[int, int]:
    """Where the question and the last answer end; nothing may be wider than the frame, no picture tiny."""
    measuring, frame = page.with_name(f"measured-{page.name}"), page.with_name(f"frame-{page.name}")
    measuring.write_text(page.read_text().replace("</body>", MEASURE))
    frame.write_text(FRAME % (measuring.name, width))
    dom = run(frame, "--window-size=1300,1000", "--dump-dom")
    found = re.search(r'data-sizes="([^"]*)"', dom)
    assert found, dom[-500:]
    wide, inner, question, answers, crushed = map(int, found[1].split())
    assert inner == width and wide <= inner
    assert crushed == 0
    return question, answers


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_the_ops_fits_too(page: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_cases, "SYNTHETIC", {name: ops_cases.SYNTHETIC[name] for name in ("gaussian", "huge")})
    ops_report(["c8", "c4"], level="quick").save(page.parent)
    measure(page.with_name("ops.html"), width)


def pixels(path: Path) -> np.ndarray:
    """uint8 `[height, width, 3]` of an 8-bit PNG without interlacing, as Chromium writes them."""
    data = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert depth == 8 and colour in (2, 6)
    body, at = b"", 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    step = 3 if colour == 2 else 4
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, 1 + width * step)
    out = np.zeros((height, width * step), np.uint8)
    for y, (kind, line) in enumerate(zip(rows[:, 0], rows[:, 1:], strict=True)):
        up = out[y - 1] if y else np.zeros_like(out[0])
        if kind in (0, 2):
            out[y] = line + (up if kind == 2 else 0)
            continue
        done, cells = np.zeros((width + 1, step), np.int32), line.reshape(width, step).astype(np.int32)
        above = np.vstack((np.zeros((1, step), np.int32), up.reshape(width, step).astype(np.int32)))
        for x in range(width):
            a, b, c = done[x], above[x + 1], above[x]
            p = a + b - c
            paeth = np.where((abs(p - a) <= abs(p - b)) & (abs(p - a) <= abs(p - c)), a,
                             np.where(abs(p - b) <= abs(p - c), b, c))  # fmt: skip
            done[x + 1] = (cells[x] + {1: a, 3: (a + b) // 2, 4: paeth}[int(kind)]) % 256
        out[y] = done[1:].reshape(-1)
    return out.reshape(height, width, step)[:, :, :3]


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1100, False)])
def test_a_screenshot_has_the_page_on_it(page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    run(page, f"--window-size={width},300", f"--screenshot={shot}", *theme)
    image = pixels(shot)
    assert image.shape == (300, width, 3)
    ground = float(np.median(image))
    assert ground < 60 if dark else ground > 230
    ink = np.abs(image.astype(int) - ground).max(-1) > 90
    assert 0.005 < ink.mean() < 0.3  # neither blank nor a blot
    assert ink[:120].any() and ink[-120:].any()
