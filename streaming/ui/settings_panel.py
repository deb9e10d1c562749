"""The settings beside the chat: what people can set, within which limits, and the presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from streaming.engine.base import LIMITS, MAX_STOP_CHARS, MAX_STOP_STRINGS, SamplingDefaults

OWN = "Yours"
PRESETS: Mapping[str, Mapping[str, float]] = {
    "Precise": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.1},
    "Balanced": {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.05},
    "Creative": {"temperature": 1.1, "top_p": 1.0, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.05},
}
PRESET_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_DEFAULTS = SamplingDefaults()


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """The panel's values, in the panel's order; None takes the model's default."""

    system_prompt: str
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str

    def for_request(self) -> dict[str, Any]:
        r"""Give the arguments of a GenerationRequest. Stop strings stand one a line; `\n` in one is a line break."""
        values = {name: getattr(self, name) for name in ("max_new_tokens", *PRESET_FIELDS)}
        stops = tuple(line.replace("\\n", "\n") for line in self.stop.splitlines() if line)
        return values | {"seed": int(self.seed) if self.seed else None, "stop": stops}


@dataclass(frozen=True, slots=True)
class SettingsPanel:
    """The panel's components; `inputs` come in the order of ChatSettings."""

    inputs: list[Any]
    preset: gr.Radio
    own: gr.BrowserState

    def field(self, name: str) -> Any:
        """Give the component of a setting."""
        return self.inputs[[f.name for f in fields(ChatSettings)].index(name)]

    @property
    def preset_fields(self) -> list[Any]:
        """The components that presets set."""
        return [self.field(name) for name in PRESET_FIELDS]


def build_settings_panel() -> SettingsPanel:
    """Lay the panel out where it is called, and wire what happens inside it."""
    own = gr.BrowserState(None, storage_key="brook-yours", secret="brook")
    system_prompt = gr.Textbox(
        label="System prompt", placeholder="How the model should behave", lines=3, max_lines=8, elem_id="system-prompt"
    )
    preset = gr.Radio([*PRESETS, OWN], label="Preset", value=None, elem_id="preset")
    with gr.Row(elem_classes="pair"):
        temperature = _number("temperature", "Temperature", 0.05, info="0 is greedy")
        top_p = _number("top_p", "Top-p", 0.01, info="1 is off")
    with gr.Row(elem_classes="pair"):
        top_k = _number("top_k", "Top-k", 1, info="0 is off")
        min_p = _number("min_p", "Min-p", 0.01, info="0 is off")
    with gr.Row(elem_classes="pair"):
        repetition_penalty = _number("repetition_penalty", "Repetition penalty", 0.01, info="1 is off")
        max_new_tokens = _number("max_new_tokens", "Max new tokens", 1, info="the longest reply")
    seed = gr.Number(0, label="Seed", info="0 is a fresh one each time", precision=0, min_width=80, elem_id="seed")
    stop = gr.Textbox(
        label="Stop strings", info="one a line", placeholder="\\n\\n", lines=2, max_lines=6, elem_id="stop-strings"
    )
    inputs: list[Any] = [
        system_prompt,
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        seed,
        stop,
    ]
    panel = SettingsPanel(inputs, preset, own)
    _wire(panel)
    return panel


def validate(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Check the panel's values, in the panel's order; a message goes to the field at fault."""
    names = [field.name for field in fields(ChatSettings)]
    return [_check(name, value) for name, value in zip(names, values, strict=True)]


def offer_defaults(
    values: Sequence[Any], defaults: SamplingDefaults, before: SamplingDefaults = _DEFAULTS
) -> list[Any]:
    """Give an update of the panel: a model's own defaults in the fields that still show those from `before`.

    Nothing is sent for what stays as it is: it would overwrite what is typed while the page waits for this.
    """
    offered = []
    for field, value in zip(fields(ChatSettings), values, strict=True):
        untouched = hasattr(before, field.name) and value == getattr(before, field.name)
        changes = untouched and value != getattr(defaults, field.name)
        offered.append(getattr(defaults, field.name) if changes else gr.skip())
    return offered


def _number(name: str, label: str, step: float, info: str) -> gr.Number:
    return gr.Number(
        getattr(_DEFAULTS, name),
        label=label,
        info=info,
        step=step,
        precision=0 if step == 1 else None,
        min_width=80,
        elem_id=name.replace("_", "-"),
    )


def _check(name: str, value: Any) -> dict[str, Any]:
    message = ""
    if name in LIMITS and value is not None:
        low, high = LIMITS[name]
        if not low <= value <= high:
            message = f"Between {low:g} and {high:,.0f}" if high >= 1000 else f"Between {low:g} and {high:g}"
    elif name == "stop":
        lines = [line for line in (value or "").splitlines() if line]
        if len(lines) > MAX_STOP_STRINGS:
            message = f"At most {MAX_STOP_STRINGS} strings"
        elif any(len(line) > MAX_STOP_CHARS for line in lines):
            message = f"At most {MAX_STOP_CHARS} characters each"
    verdict: dict[str, Any] = gr.validate(not message, message)
    return verdict


def _wire(panel: SettingsPanel) -> None:
    hidden: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def apply(preset: str, own: dict[str, float] | None) -> list[Any]:
        values = (own or {}) if preset == OWN else PRESETS.get(preset, {})
        return [values.get(name, gr.skip()) for name in PRESET_FIELDS]

    def keep(*values: float | None) -> tuple[str, dict[str, float | None]]:
        return OWN, dict(zip(PRESET_FIELDS, values, strict=True))

    panel.preset.input(apply, [panel.preset, panel.own], panel.preset_fields, **hidden)
    gr.on(
        [component.input for component in panel.preset_fields],
        keep,
        panel.preset_fields,
        [panel.preset, panel.own],
        trigger_mode="always_last",
        **hidden,
    )
    names = [f.name for f in fields(ChatSettings)]
    for name, component in zip(names, panel.inputs, strict=True):
        if name in LIMITS or name == "stop":
            # Only what is queued has its validator's words shown at the field (gradio 6.31).
            component.blur(_nothing, component, None, validator=_checker(name), **hidden | {"queue": True})


def _nothing(_value: Any) -> None:
    """What is done with a value on leaving its field: it is only checked."""


def _checker(name: str) -> Any:
    return lambda value: _check(name, value)
