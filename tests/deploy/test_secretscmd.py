from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.cli import main, parse_train
from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config, save_config
from deploy.presets import preset
from deploy.rundir import begin, run_directory
from deploy.secretscmd import SecretsOptions, make_secrets
from replay_service.security import ROLES, password_file, read_password

PRIVATE = [*(f"{role}.password" for role in ROLES), "users.acl", "ca.key", "server.key"]


def test_one_command_makes_everything_with_the_right_modes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "secrets"
    assert main(["secrets", str(made), "--hosts", "replay.example", "10.0.0.5"]) == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.iterdir()}
    assert modes == {**dict.fromkeys(PRIVATE, 0o600), "ca.crt": 0o644, "server.crt": 0o644}
    assert made.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr()
    for role in ROLES:
        word = read_password(password_file(made, role))
        assert len(word) >= 40 and word not in said.out + said.err
        assert f"{role}.password" in said.out


def test_secrets_are_never_overwritten_unless_asked(tmp_path: Path) -> None:
    options = SecretsOptions(directory=tmp_path)
    make_secrets(options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"already holds .*users\.acl: add --update .*--rotate"):
        make_secrets(options)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_secrets(replace(options, rotate=True))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert not [name for name in after if after[name] == before[name]]


def test_update_adds_what_a_newer_release_has_and_touches_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_secrets(SecretsOptions(directory=tmp_path))
    password_file(tmp_path, "reader").unlink()
    acl = tmp_path / "users.acl"
    whole = acl.read_text().splitlines()
    older = [line for line in whole if not line.startswith("user reader ")]
    acl.write_text("\n".join(older).replace("+fcall|replay_stats ", "") + "\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(["secrets", str(tmp_path), "--update"]) == 0
    assert "added reader.password; users.acl" in capsys.readouterr().out.replace("\n", " ")
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"reader.password", "users.acl"}
    assert (tmp_path / "reader.password").stat().st_mode & 0o777 == 0o600

    def others(lines: list[str]) -> set[str]:
        return {line for line in lines if not line.startswith("user reader ")}

    lines = acl.read_text().splitlines()
    assert others(lines) == others(whole) and len(lines) == len(whole)
    word = read_password(password_file(tmp_path, "reader"))
    assert hashlib.sha256(word.encode()).hexdigest() in acl.read_text()


def test_update_of_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no passwords to keep: leave out --update"):
        make_secrets(SecretsOptions(directory=tmp_path, update=True))
    assert not list(tmp_path.iterdir())


def test_certificate_names_the_hosts_and_was_signed_by_the_ca(tmp_path: Path) -> None:
    from cryptography import x509

    make_secrets(SecretsOptions(directory=tmp_path, hosts=("replay.example", "10.0.0.5"), days=9))
    ca = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["replay.example", "localhost"]
    found = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert found == ["10.0.0.5", "127.0.0.1", "::1"]
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 9


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("secrets", "DIR"),
        ("secrets x --days 0", "--days is 0, expected 1 to 3650"),
        ("secrets x --rotate --update", "--rotate replaces what --update keeps"),
        ("secrets x --hosts redis://a:1", "--hosts takes names and addresses"),
    ],
)
def test_wrong_input_is_one_line(line: str, want: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert want in re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err)


@pytest.mark.parametrize(
    "url", ["redis://:hunter2@a:1", "rediss://me:hunter2@a", "http://:hunter2@a", "me:hunter2@a:1"]
)
def test_password_in_the_address_is_refused_without_showing_it(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--redis", url]) == 2
    said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err)
    assert "--replay.password-file FILE" in said and "hunter2" not in said


def test_run_with_secrets_saves_paths_alone_and_resumes(tmp_path: Path) -> None:
    word, run = tmp_path / "word", tmp_path / "run"
    word.write_text("hunter2\n")
    word.chmod(0o600)
    line = f"--run-dir {run} --redis rediss://me@replay.example:1 --replay.password-file {word}"
    config = parse_train(line.split())
    assert (config.replay.password_file, config.redis) == (word, "rediss://me@replay.example:1")
    with run_directory(config):
        save_config(config, run / FILE_NAME)
        begin(run)
    assert "hunter2" not in (run / FILE_NAME).read_text() + repr(config)
    again = parse_train(["--run-dir", str(run)])
    assert again == load_config(run / FILE_NAME) == config
    moved = parse_train(["--run-dir", str(run), "--replay.secrets", str(tmp_path)])
    with run_directory(moved) as directory:
        assert directory == run


def test_how_a_run_is_guarded_does_not_define_it() -> None:
    from deploy.config import config_hash, with_values

    changes = {
        "replay.durability": "strict",
        "replay.listen": "127.0.0.1:6400",
        "replay.secrets": Path("x"),
    }
    config: TrainConfig = preset("v3-cartpole")
    assert config_hash(config) == config_hash(with_values(config, changes))
