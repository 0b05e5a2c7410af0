import json
import re
from pathlib import Path

import pytest

import train
from training.config import resolve_train_config, to_json
from training.credentials import refuse_credentials

SECRET = "hf_" + 30 * "a"


@pytest.mark.parametrize(
    "value",
    [SECRET, "sk-" + 30 * "b", "ghp_" + 36 * "c", "AKIA" + 16 * "D", "https://me:pass@host/x"],
)
def test_what_looks_secret_is_refused_and_not_repeated(value: str) -> None:
    with pytest.raises(ValueError, match="--init_from: looks like a password") as caught:
        refuse_credentials({"init_from": value}, "--")
    assert value not in str(caught.value)


@pytest.mark.parametrize("key", ["token", "hub_token", "API_KEY", "apikey", "password", "secret"])
def test_so_is_what_is_named_so(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"x.json: a.{key}: looks")):
        refuse_credentials({"a": {key: "plain"}}, "x.json: ")


def test_the_shipped_configuration_holds_none() -> None:
    refuse_credentials(to_json(resolve_train_config(sample_prompt="a key, a token: sk-1")), "--")
    for path in Path("ds_configs").glob("*.json"):
        refuse_credentials(json.loads(path.read_text()), "")


def test_a_run_writes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    argv = ["--model", "debug", "--run_dir", str(run_dir), "--sample_prompt", f"my {SECRET}"]
    assert train.main(argv) == 2
    assert "error: --sample_prompt: looks like" in capsys.readouterr().err
    assert not run_dir.exists()
