"""A model on the Hugging Face hub, as a folder on this machine.

`from_pretrained` with a name waits about 46 s for a hub that is not there (transformers 5.23). So the hub is asked
one question first, with little more than a second for the answer; files then come through `snapshot_download`, and
what is loaded is always a local folder.
"""

import re
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from streaming.errors import HubUnreachable, ModelDamaged, ModelGated, ModelNotFound
from streaming.models.progress import LoadProgress, ProgressCallback

_ANSWER_TIMEOUT_S = 1.2

_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
_SMALL_FILES = re.compile(r"[^/]+\.(json|jinja|model|txt|tiktoken)")


class HubModel:
    """A model on the hub, or its copy in the hub's cache on this machine.

    With `offline`, or under HF_HUB_OFFLINE, only the copy counts.
    """

    def __init__(self, model_id: str, *, offline: bool, progress: ProgressCallback) -> None:
        self.model_id = model_id
        self._offline = offline or huggingface_hub.is_offline_mode()
        self._progress = progress
        self._answer: list[str] | Exception | None = None
        self._asker: threading.Thread | None = None
        self._deadline = 0.0

    def ask(self) -> None:
        """Ask the hub about the model, in the background and once; `fetch` asks where nobody has."""
        if self._asker is None and not self._offline:
            # A daemon, left to itself after the timeout: waiting for a dead name server cannot be interrupted.
            self._asker = threading.Thread(target=self._ask, name="brook-hub", daemon=True)
            self._deadline = time.monotonic() + _ANSWER_TIMEOUT_S
            self._asker.start()

    def check(self) -> None:
        """Raise what `fetch` would raise, as far as the hub's one answer tells."""
        try:
            self._list_files()
        except HubUnreachable as unreachable:
            self._find_copy(False, unreachable)

    def fetch(self, *, weights: bool) -> Path:
        """Return the model's folder, fetching what is missing: with `weights`, or only the small files.

        Raises ModelNotFound, ModelGated or HubUnreachable; the last one only if the cache has no copy either.
        """
        try:
            files = self._list_files()
        except HubUnreachable as unreachable:
            return self._find_copy(weights, unreachable)
        wanted = [name for name in files if _SMALL_FILES.fullmatch(name)]
        if weights:
            if not (found := _choose_weights(files)):
                raise ModelDamaged(f"{self.model_id} has no weights on the hub that transformers can read.")
            wanted += found
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.model_id, allow_patterns=wanted, tqdm_class=_reporting_bar(self._progress)
                )
            )
        except Exception as error:
            raise self._explain(error) from error

    def _ask(self) -> None:
        try:
            info = huggingface_hub.HfApi().model_info(self.model_id, timeout=_ANSWER_TIMEOUT_S)
            self._answer = [sibling.rfilename for sibling in info.siblings or ()]
        except Exception as error:  # handed to the thread that waits
            self._answer = error

    def _list_files(self) -> list[str]:
        self.ask()
        if self._asker is None:
            raise HubUnreachable(f"{self.model_id} is not on this machine, and offline nothing is fetched.")
        self._asker.join(max(0.0, self._deadline - time.monotonic()))
        if isinstance(self._answer, list):
            return self._answer
        raise self._explain(self._answer) from self._answer

    def _find_copy(self, weights: bool, unreachable: HubUnreachable) -> Path:
        try:
            folder = Path(
                huggingface_hub.snapshot_download(self.model_id, local_files_only=True, allow_patterns="config.json")
            )
        except (LocalEntryNotFoundError, HFValidationError):
            raise unreachable from None
        if weights and not _choose_weights([path.name for path in folder.iterdir()]):
            raise unreachable
        return folder

    def _explain(self, error: Exception | None) -> Exception:
        name = self.model_id
        if isinstance(error, GatedRepoError):
            return ModelGated(
                f"{name} is given only to people who asked for it: accept its terms at "
                f"{huggingface_hub.constants.ENDPOINT}/{name}, then run `hf auth login` and start again."
            )
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            return ModelNotFound(
                f"There is no model {name}, neither as a path on this machine nor on the hub (a private one needs "
                f"`hf auth login` first); check the spelling."
            )
        if isinstance(error, HfHubHTTPError):
            return HubUnreachable(
                f"{name} cannot be fetched: the hub answered {error.response.status_code}; try again later."
            )
        return HubUnreachable(
            f"{name} is not on this machine and {huggingface_hub.constants.ENDPOINT} cannot be reached; connect to a "
            f"network, or start without --model for the default model."
        )


def _choose_weights(files: list[str]) -> list[str]:
    """Choose one of the forms in which a repository may hold the same weights: safetensors before pickles."""
    return [name for name in files if _SAFETENSORS.fullmatch(name)] or [
        name for name in files if _PICKLES.fullmatch(name)
    ]


def _reporting_bar(progress: ProgressCallback) -> type[tqdm]:
    """Make the hub's progress bar tell `progress` too, also where the bar itself is not shown."""

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("name") == "huggingface_hub.snapshot_download"
            self._n_received = 0
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> Any:
            if self._counts_bytes:
                self._n_received += int(n or 0)
                progress(LoadProgress("download", self._n_received, int(self.total or 0)))
            return super().update(n)

    return ReportingBar
