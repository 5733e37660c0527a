"""A real browser shows the report: no errors, no requests, every picture visible; on a phone, a desk, in the dark."""

import json
import re
import shutil
import subprocess

import pytest

from semi_fast.reporting import write_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")]

# Runs in a frame of the width wanted: the browser's own window cannot be as narrow as a phone.
PROBE = """<body style="margin:0"><iframe id=f src="PAGE" style="width:WIDTHpx;height:4000px;border:0"></iframe><script>
const frame = document.getElementById('f');
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll('img').forEach(i => i.loading = 'eager');
  setTimeout(() => {
    const seen = e => {
      const box = e.getBoundingClientRect();
      return box.width > 20 && box.height > 20 && box.right <= WIDTH + 1;
    };
    const texts = [...page.querySelectorAll('svg text')].map(t => parseFloat(view.getComputedStyle(t).fontSize)
      * t.getScreenCTM().a);
    const card = view.getComputedStyle(page.querySelector('figure')).backgroundColor;
    const out = {
      images: page.images.length, loaded: [...page.images].filter(i => i.naturalWidth > 0 && seen(i)).length,
      drawings: page.querySelectorAll('figure svg').length,
      shown: [...page.querySelectorAll('figure svg')].filter(seen).length,
      overflow: page.documentElement.scrollWidth - WIDTH, smallest: Math.min(...texts), card: card,
      ink: view.getComputedStyle(page.querySelector('figure svg text')).fill,
      requests: view.performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:')),
    };
    document.body.innerHTML = '<pre>' + JSON.stringify(out) + '</pre>';
  }, 300);
};</script>"""


def look(page, tmp_path, width: int, *flags: str) -> dict:
    """What the browser sees of the page in a frame of that width."""
    probe = page.parent / f"probe-{width}.html"
    probe.write_text(PROBE.replace("PAGE", page.name).replace("WIDTH", str(width)))
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"),
        *("--allow-file-access-from-files", "--virtual-time-budget=8000", f"--log-net-log={tmp_path / 'net.json'}"),
        *("--enable-logging=stderr", "--window-size=1500,4100", *flags, "--dump-dom", probe.as_uri()),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    network = (tmp_path / "net.json").read_text()
    assert [url for url in re.findall(r'"url":"(https?://[^"]+)"', network) if "google" not in url] == []
    found = re.search(r"<pre>(.*?)</pre>", ran.stdout, flags=re.DOTALL)
    assert found, ran.stdout[-2000:]
    return json.loads(found[1])


def brightness(color: str) -> float:
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / 3


def test_the_report_in_a_browser(semi_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(semi_run, folder)
    page = write_report([folder])
    for width in (375, 1440):
        seen = look(page, tmp_path, width)
        assert seen["images"] == seen["loaded"] > 50
        assert seen["drawings"] == seen["shown"] > 10
        assert seen["overflow"] <= 0, "the page is wider than the screen"
        assert seen["smallest"] > 8, "too small to read"
        assert seen["requests"] == []
        assert brightness(seen["card"]) > 240
        assert brightness(seen["ink"]) < 130
    dark = look(page, tmp_path, 1440, "--blink-settings=preferredColorScheme=0")
    assert brightness(dark["card"]) < 50
    assert brightness(dark["ink"]) > 130
