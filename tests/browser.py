"""A headless Chromium, driven over chromedriver's HTTP interface with the standard library alone."""

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from dashboards.serve import free_port

from .waiting import wait_until

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,1000",
)  # fmt: skip


class Browser:
    def __init__(self, port, profile, *flags):
        self._base = f"http://127.0.0.1:{port}"
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}", *flags]}
        wanted = {
            "pageLoadStrategy": "none",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{answer['sessionId']}"

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address):
        self._send("POST", "/url", {"url": address})

    def run(self, script, *arguments):
        """The value that the script returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, condition, seconds=60):
        """What the expression becomes when it is true at last."""
        return wait_until(lambda: self.run(f"return {condition}"), seconds, pause=0.1, what=condition)

    def point(self, x, y, click=False):
        """Moves the mouse to a place of the window."""
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": actions}
        self._send("POST", "/actions", {"actions": [mouse]})

    def press(self, *keys):
        """Keys by their WebDriver code points or characters, one after another."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def theme(self, name):
        feature = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self._send("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": feature})

    def width(self, pixels):
        """Of the window's inside."""
        size = {"width": pixels, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        command = "Emulation.setDeviceMetricsOverride"
        self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": size})

    def messages(self):
        """What the console has said since the last time."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def requests(self):
        """The addresses that pages have asked for since the last time."""
        entries = [json.loads(entry["message"]) for entry in self._send("POST", "/se/log", {"type": "performance"})]
        events = [entry["message"] for entry in entries]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path, whole=False):
        parameters = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            parameters["clip"] = {
                "x": 0, "y": 0, "scale": 1, "width": self.run("return document.documentElement.scrollWidth"),
                "height": self.run("return document.documentElement.scrollHeight"),
            }  # fmt: skip
        shot = self._send("POST", "/goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": parameters})
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self._send("DELETE", "")


def _connected(driver, *arguments):
    """None while the driver is not listening yet."""
    assert driver.poll() is None, "the driver has ended"
    try:
        return Browser(*arguments)
    except OSError:
        return None


@contextmanager
def browser(*flags):
    port = free_port(22000)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(["chromedriver", f"--port={port}", "--log-level=OFF"], stdout=subprocess.DEVNULL)
        try:
            made = wait_until(lambda: _connected(driver, port, profile, *flags), what="the driver's answer")
            try:
                yield made
            finally:  # a driver that ends leaves its browsers behind
                made.close()
        finally:
            driver.terminate()
            driver.wait(20)
