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
        "--model", "a/b", "--model", "c", "--model-memory", "900", "--trust-remote-code",
        "--engine", "local", "--device", "cuda:1", "--dtype", "float32",
        "--quantize", "none",
        "--cache-memory", "64", "--max-active", "2", "--max-queued", "0",
        "--host", "::1", "--port", "0", "--share", "--auth", "ann:p:w,d", "--auth", "bob:x",
        "--api-key", "sk-one-two", "--api-key", "sk-three-four", "--grace", "7.5",
        "--data-dir", str(tmp_path), "--offline",
    )  # fmt: skip
    assert given == Settings(
        models=("a/b", "c"),
        model_memory=900,
        trust_remote_code=True,
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
        api_key=("sk-one-two", "sk-three-four"),
        grace=7.5,
        data_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        offline=True,
    )


def test_every_flag_has_a_twin(tmp_path):
    twins = {
        "BROOK_MODEL": "a/b, c",
        "BROOK_MODEL_MEMORY": "900",
        "BROOK_TRUST_REMOTE_CODE": "1",
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
        "BROOK_API_KEY": "sk-one-two,sk-three-four",
        "BROOK_GRACE": "5",
        "BROOK_DATA_DIR": str(tmp_path),
        "BROOK_OFFLINE": "true",
    }
    assert load(**twins) == Settings(
        models=("a/b", "c"),
        model_memory=900,
        trust_remote_code=True,
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
        api_key=("sk-one-two", "sk-three-four"),
        grace=5.0,
        data_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        offline=True,
    )


def test_every_setting_has_a_flag_and_help_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    names = {field.name for field in dataclasses.fields(Settings)} - {"cache_dir", "space"}
    for name in names:
        flag = "--" + {"models": "model"}.get(name, name).replace("_", "-")
        assert flag in help_text
    assert help_text.count("(default: ") == len(names)


def test_a_flag_wins_over_its_twin_and_does_not_add_to_it():
    given = load("--port", "1", "--model", "a", BROOK_PORT="2", BROOK_MODEL="b", BROOK_HOST="h")
    assert (given.port, given.models, given.host) == (1, ("a",), "h")


def test_a_switch_can_be_off_in_the_environment_and_an_empty_twin_is_no_twin():
    given = load(BROOK_SHARE="0", BROOK_OFFLINE="", BROOK_PORT="", BROOK_MODEL="")
    assert given == Settings()


def test_a_space_listens_on_every_address_unless_told_otherwise():
    assert load(SPACE_ID="ann/brook").host == "0.0.0.0"
    assert load("--host", "127.0.0.1", SPACE_ID="ann/brook").host == "127.0.0.1"
    assert load(SPACE_ID="ann/brook", BROOK_HOST="::1").host == "::1"


def test_where_strangers_come_an_unwatched_reply_goes_on_for_less():
    assert load().grace == 60
    assert load("--share").grace == load(SPACE_ID="ann/brook").grace == 15
    assert load("--share", "--grace", "0").grace == 0


def test_a_space_keeps_conversations_on_its_disk_if_it_has_one(monkeypatch, tmp_path):
    monkeypatch.setattr("streaming.settings.SPACE_DISK", tmp_path)
    assert load(SPACE_ID="ann/brook").data_dir == tmp_path / "brook"
    assert load("--data-dir", "/elsewhere", SPACE_ID="ann/brook").data_dir == Path("/elsewhere")
    assert load().data_dir == Settings().data_dir
    monkeypatch.setattr("streaming.settings.SPACE_DISK", tmp_path / "none")
    assert load(SPACE_ID="ann/brook").data_dir == Settings().data_dir


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
        (["--grace", "soon"], "--grace: must be a number of seconds, not 'soon'"),
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
    for flag, choices in {
        "--engine": ["auto", "local", "batched"],
        "--dtype": ["float32", "bfloat16"],
        "--quantize": ["none"],
    }.items():
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


def test_an_api_key_is_never_shown_and_has_no_space_or_comma(capsys):
    given = load("--api-key", "hunter-222")
    assert "hunter-222" not in repr(given)
    for wrong in ("hunter-2 22", "hunter-2,22", "hunter2", "jägerei-22"):
        words = "--api-key: must be 8 or more letters, digits and signs, without spaces and commas"
        assert refusal(capsys, "--api-key", wrong) == words


def test_a_remote_engine_and_its_server_go_together(capsys):
    given = load("--engine", "remote", "--base-url", "http://box:8000/v1", "--api-key-env", "KEY", KEY="x")
    assert (given.engine, given.base_url, given.api_key_env) == ("remote", "http://box:8000/v1", "KEY")
    both = "--base-url: goes with --engine remote, neither without the other"
    assert refusal(capsys, "--engine", "remote") == both
    assert refusal(capsys, "--base-url", "http://box/v1") == both
    assert refusal(capsys, "--api-key-env", "KEY", KEY="x") == "--api-key-env: goes with --engine remote"
    remote = ("--engine", "remote", "--base-url", "http://box/v1", "--api-key-env", "KEY")
    assert refusal(capsys, *remote) == "--api-key-env: there is no variable KEY in the environment"


@pytest.mark.parametrize("url", ["", "box:8000", "ftp://box", "http://", "http://ann:hunter2@box/v1", "http://a b"])
def test_a_servers_address_is_one(capsys, url):
    words = "--base-url: must be an address such as http://127.0.0.1:8000/v1, without a user"
    assert refusal(capsys, "--engine", "remote", "--base-url", url) == words


def test_a_share_link_and_a_space_are_public():
    assert not load("--host", "0.0.0.0").is_public
    assert load("--share").is_public
    assert load(SPACE_ID="ann/brook").is_public


def test_settings_load_without_any_heavy_import():
    code = (
        "import sys; from streaming.settings import load_settings; load_settings([], {});"
        "assert not {'torch', 'transformers', 'gradio', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_people_elsewhere_can_reach_what_is_shared():
    assert not load().is_shared
    assert not load("--host", "::1").is_shared
    for arguments in (["--share"], ["--host", "0.0.0.0"], ["--host", "192.168.1.7"]):
        assert load(*arguments).is_shared
    assert load(SPACE_ID="ann/brook").is_shared


def test_whoever_hands_out_passwords_or_keys_expects_others():
    assert load("--auth", "ann:pw").is_shared
    assert load("--api-key", "sk-one-two").is_shared
