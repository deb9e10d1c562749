"""Settings: flags, their twins in the environment, and one sentence for what is wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.settings import Settings, load_settings


def load(*arguments: str, **environment: str) -> Settings:
    return load_settings(arguments, environment)


def refusal(capsys, *arguments: str, **environment: str) -> str:
    with pytest.raises(SystemExit) as refused:
        load(*arguments, **environment)
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, "one sentence, on one line"
    return error.strip()


def test_nothing_given_means_the_defaults():
    assert load() == Settings()


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1


def test_every_flag_is_read(tmp_path):
    given = load(
        "--model", "a/b", "--engine", "local", "--device", "cuda:1", "--dtype", "float32",
        "--quantize", "none",
        "--cache-memory", "64", "--max-active", "2", "--max-queued", "0",
        "--host", "::1", "--port", "0", "--share", "--auth", "ann:p:w,d", "--auth", "bob:x",
        "--data-dir", str(tmp_path), "--offline",
    )  # fmt: skip
    assert given == Settings(
        model="a/b",
        engine="local",
        device="cuda:1",
        dtype="float32",
        quantize="none",
        cache_memory=64,
        max_active=2,
        max_queued=0,
        host="::1",
        port=0,
        share=True,
        auth=(("ann", "p:w,d"), ("bob", "x")),
        data_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        offline=True,
    )


def test_every_flag_has_a_twin(tmp_path):
    twins = {
        "BROOK_MODEL": "a/b",
        "BROOK_ENGINE": "local",
        "BROOK_DEVICE": "cpu",
        "BROOK_DTYPE": "bfloat16",
        "BROOK_QUANTIZE": "none",
        "BROOK_CACHE_MEMORY": "64",
        "BROOK_MAX_ACTIVE": "2",
        "BROOK_MAX_QUEUED": "0",
        "BROOK_HOST": "0.0.0.0",
        "BROOK_PORT": "8000",
        "BROOK_SHARE": "1",
        "BROOK_AUTH": "ann:pw,bob:x",
        "BROOK_DATA_DIR": str(tmp_path),
        "BROOK_OFFLINE": "true",
    }
    assert load(**twins) == Settings(
        model="a/b",
        engine="local",
        device="cpu",
        dtype="bfloat16",
        quantize="none",
        cache_memory=64,
        max_active=2,
        max_queued=0,
        host="0.0.0.0",
        port=8000,
        share=True,
        auth=(("ann", "pw"), ("bob", "x")),
        data_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        offline=True,
    )


def test_every_setting_has_a_flag_and_help_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    for name in {field.name for field in dataclasses.fields(Settings)} - {"cache_dir"}:
        flag = "--" + name.replace("_", "-")
        assert flag in help_text
    assert help_text.count("(default: ") == 14


def test_a_flag_wins_over_its_twin_and_does_not_add_to_it():
    given = load("--port", "1", "--model", "a", BROOK_PORT="2", BROOK_MODEL="b", BROOK_HOST="h")
    assert (given.port, given.model, given.host) == (1, "a", "h")


def test_a_switch_can_be_off_in_the_environment_and_an_empty_twin_is_no_twin():
    given = load(BROOK_SHARE="0", BROOK_OFFLINE="", BROOK_PORT="", BROOK_MODEL="")
    assert given == Settings()


def test_a_space_listens_on_every_address_unless_told_otherwise():
    assert load(SPACE_ID="ann/brook").host == "0.0.0.0"
    assert load("--host", "127.0.0.1", SPACE_ID="ann/brook").host == "127.0.0.1"
    assert load(SPACE_ID="ann/brook", BROOK_HOST="::1").host == "::1"


def test_data_dir_understands_home_and_relative_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load("--data-dir", "~/d").data_dir == tmp_path / "d"
    assert load("--data-dir", "d").data_dir == tmp_path / "d"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "x"], "--port: must be a number from 0 to 65535, not 'x'"),
        (["--port", "65536"], "--port: must be a number from 0 to 65535, not '65536'"),
        (["--port=-1"], "--port: must be a number from 0 to 65535, not '-1'"),
        (["--port", "٣"], "--port: must be a number from 0 to 65535, not '٣'"),
        (["--device", "gpu"], "--device: must be auto, cpu, mps, cuda or cuda:N, not 'gpu'"),
        (["--model", " "], "--model: must not be empty"),
        (["--host", ""], "--host: must not be empty"),
        (["--auth", "ann"], "--auth: must be USER:PASSWORD, with neither of them empty"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--por", "1"], "unrecognized arguments: --por 1"),
        (["--port"], "--port: expected one argument"),
    ],
)
def test_a_wrong_value_is_one_sentence(capsys, arguments, says):
    assert refusal(capsys, *arguments) == says


def test_a_value_out_of_a_choice_names_the_choices(capsys):
    for flag, choices in {"--engine": ["local"], "--dtype": ["float32", "bfloat16"], "--quantize": ["none"]}.items():
        said = refusal(capsys, flag, "magic")
        assert said.startswith(flag)
        assert all(choice in said for choice in choices)


@pytest.mark.parametrize(
    ("twin", "value", "says"),
    [
        ("BROOK_PORT", "x", "BROOK_PORT: must be a number from 0 to 65535, not 'x'"),
        ("BROOK_MAX_ACTIVE", "many", "BROOK_MAX_ACTIVE: must be a whole number, not 'many'"),
        ("BROOK_CACHE_MEMORY", "-1", "BROOK_CACHE_MEMORY: must be a whole number of megabytes, not '-1'"),
        ("BROOK_SHARE", "maybe", "BROOK_SHARE: must be 1 or 0, not 'maybe'"),
        ("BROOK_AUTH", "a:b,,c:d", "BROOK_AUTH: must be USER:PASSWORD, with neither of them empty"),
        ("BROOK_AUTH", "secret", "BROOK_AUTH: must be USER:PASSWORD, with neither of them empty"),
    ],
)
def test_a_wrong_twin_is_named(capsys, twin, value, says):
    assert refusal(capsys, **{twin: value}) == says


def test_a_password_is_never_shown(capsys):
    given = load("--auth", "ann:hunter2")
    assert "hunter2" not in repr(given)
    assert "hunter2" not in f"{given}"
    assert "hunter2" not in refusal(capsys, "--auth", ":hunter2")


def test_settings_load_without_any_heavy_import():
    code = (
        "import sys; from streaming.settings import load_settings; load_settings([], {});"
        "assert not {'torch', 'transformers', 'gradio', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_second_model_is_refused_where_one_would_be_dropped_silently(capsys):
    assert refusal(capsys, "--model", "a", "--model", "b") == "--model: one model at a time"
