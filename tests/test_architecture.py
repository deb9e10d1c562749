"""The shape of the house: imports run downwards only, and the library needs no gradio."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the roof down: a module may import from lines below its own, and from its own line.
FLOORS = [
    ["app"],
    ["streaming.ui"],
    ["streaming.server"],
    ["streaming.__main__"],
    ["streaming.cli"],
    ["streaming.session"],
    ["streaming.printing"],
    ["streaming.conversations"],
    ["streaming.engine"],
    ["streaming.models"],
    ["streaming.chat"],
    ["streaming.reasoning"],
    ["streaming.streamers"],
    ["streaming.detokenizer"],
    ["streaming.log"],
    ["streaming.events"],
    ["streaming.errors"],
    ["streaming.settings"],
    ["streaming.startup"],
]


def floor_of(module: str) -> int | None:
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def sources() -> list[tuple[str, Path]]:
    paths = [ROOT / "app.py", *sorted((ROOT / "streaming").rglob("*.py"))]
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in paths]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_floor():
    assert [m for m, _ in sources() if m != "streaming" and floor_of(m) is None] == []


def test_imports_run_downwards_only():
    upward = [
        f"{module} imports {name}"
        for module, path in sources()
        if module != "streaming"  # the public names come from every floor
        for name in imports(path)
        if name.startswith(("streaming.", "app.")) and (floor_of(name) or 0) < (floor_of(module) or 0)
    ]
    assert upward == []


def test_only_the_page_knows_gradio_and_only_loading_fetches_models():
    for module, path in sources():
        text = path.read_text()
        if not module.startswith(("app", "streaming.ui")):
            assert "gradio" not in {name.split(".")[0] for name in imports(path)}, module
        if not module.startswith("streaming.models"):
            assert ".from_pretrained(" not in text, module


def test_the_library_imports_without_gradio():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "import streaming\n"
        "for name in streaming.__all__: getattr(streaming, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_command_line_waits_for_no_heavy_import():
    code = (
        "import sys, streaming, streaming.settings; assert not {'torch', 'transformers', 'gradio'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
