"""A headless Chromium driven over two pipes by the DevTools protocol, and what it complained of."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage
--disable-extensions --hide-scrollbars --remote-debugging-pipe""".split()
Color = tuple[int, int, int]
PATIENCE = 60.0  # seconds for one answer

UNFOLD = "document.querySelectorAll('details').forEach(d => d.open = true)"
# By how many pixels the page is wider than its window.
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# The ratio of the WCAG between a text's color and the nearest opaque background behind it.
CONTRASTS = """(() => {
  const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = rgb => rgb.slice(0, 3).map(channel)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3 && n.data.trim());
    if (!text.length || !e.checkVisibility() || e.closest("script, title")) continue;
    const style = getComputedStyle(e);
    const ink = rgb(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), e.tagName + "." + e.className + " " + e.textContent]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()"""


def find_chromium() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab. `requests` holds the addresses asked for, `complaints` what went wrong in it."""

    def __init__(self, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        program = find_chromium()
        assert program is not None
        # The browser reads commands from descriptor 3 and answers on 4, each ended by a zero byte.
        wire = f'exec 3<&{commands} 4>&{answers}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", wire, program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._last, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        self.send("Browser.close")
        os.close(self._write)
        os.close(self._read)
        self._process.wait(PATIENCE)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; events that come before it are noted."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            assert chunk, "the browser ended, or said nothing for a minute"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.complaints.append(json.dumps(params))
            case "Page.javascriptDialogOpening":
                self.complaints.append(f"dialog: {params['message']}")
                self._last += 1
                answer = {"id": self._last, "method": "Page.handleJavaScriptDialog"}
                answer |= {"params": {"accept": True}, "sessionId": self._session}
                os.write(self._write, json.dumps(answer).encode() + b"\0")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file at a size of window and in a theme, and forget the page before it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[theme])
        self.requests, self.complaints = [], []
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < until, f"never came true: {condition}"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON carries it."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, element: str) -> None:
        """Press and release the mouse over the middle of what the expression yields."""
        x, y = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center', inline: 'center'}});"
            " const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2] }})({element})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        for letter in text:
            self.send("Input.dispatchKeyEvent", type="char", text=letter)

    def press(self, key: str) -> None:
        """Press and release a key such as Tab or Enter."""
        code = {"Tab": 9, "Enter": 13, "Space": 32}[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra
            )

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """A picture of the page, or of what the window shows of it."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(data["data"]))
        return path

    def picture(
        self, x: float, y: float, width: float, height: float, scale: float = 1.0
    ) -> list[list[Color]]:
        """The colors of a part of the page in rows; `x` and `y` count from the page's corner."""
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": scale}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        return read_png(base64.b64decode(self.send("Page.captureScreenshot", **options)["data"]))


def read_png(data: bytes) -> list[list[Color]]:
    """The rows of a picture of eight bits for a color, as browsers write it."""
    at, compressed = 8, b""
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, depth, colors = int.from_bytes(body[:4]), body[8], body[9]
        if kind == b"IDAT":
            compressed += body
        at += length + 12
    assert depth == 8 and colors in (2, 6), (depth, colors)
    step = 3 if colors == 2 else 4
    raw, rows, stride = zlib.decompress(compressed), [], width * step + 1
    above = bytearray(width * step)
    for start in range(0, len(raw), stride):
        line = bytearray(raw[start + 1 : start + stride])
        _unfilter(raw[start], line, above, step)
        rows.append([(line[i], line[i + 1], line[i + 2]) for i in range(0, len(line), step)])
        above = line
    return rows


def _unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> None:
    """Add to each byte what its row was predicted from: the filters of the PNG specification."""
    for i, byte in enumerate(line):
        left = line[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        line[i] = (byte + _PREDICTIONS[kind](left, above[i], corner)) & 255


def _paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    return min((left, above, corner), key=lambda near: abs(guess - near))


_PREDICTIONS = (
    lambda left, above, corner: 0,
    lambda left, above, corner: left,
    lambda left, above, corner: above,
    lambda left, above, corner: (left + above) // 2,
    _paeth,
)


def assert_quiet(browser: Browser, page: Path, *, width: int, dark: bool) -> None:
    """It opens without a complaint or a request, runs no text as code, and fits its window."""
    browser.open(page, width=width, dark=dark)
    browser.evaluate(UNFOLD)
    assert browser.evaluate(OVERFLOW) == 0
    assert browser.evaluate("typeof bitten") == "undefined"
    assert browser.evaluate("document.images.length + document.scripts.length") == 1
    assert browser.evaluate("performance.getEntriesByType('resource').length") == 0
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.complaints == []


def assert_readable(browser: Browser, page: Path, *, dark: bool) -> None:
    """All text stands out from what is behind it, on white or on dark paper as asked."""
    browser.open(page, dark=dark)
    browser.evaluate(UNFOLD)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert contrasts[0][0] >= 4.5, contrasts[:5]
