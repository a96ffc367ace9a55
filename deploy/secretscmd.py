"""`dreamfleet secrets`: passwords, an ACL file and certificates for a replay server."""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deploy.config import ConfigError
from deploy.progress import console
from replay_service.errors import ReplayConfigError
from replay_service.security import (
    ACL_FILE,
    CA_FILE,
    ROLES,
    password_file,
    read_password,
    render_acl,
)

PASSWORD_BYTES = 32
CA_DAYS = 3650
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names that every server certificate holds."""
PUBLIC = {CA_FILE: 0o644, "server.crt": 0o644}
"""Files that hold no secret; all others can be read by their owner alone."""


@dataclass(frozen=True, kw_only=True)
class SecretsOptions:
    """Make everything that a guarded replay server and those who use it need."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory to make it in."""
    hosts: tuple[str, ...] = ()
    """Names and addresses under which the server is reached, besides localhost."""
    days: int = 825
    """Days for which the server's certificate is valid; that of the CA is for ten years."""
    rotate: bool = False
    """Replace what is there: every password, the CA and the certificate."""
    update: bool = False
    """Keep every password and certificate that is there, add the roles that this release has
    beside them, and write what each role may do anew."""

    def __post_init__(self) -> None:
        if not 1 <= self.days <= CA_DAYS:
            raise ConfigError(f"--days is {self.days}, expected 1 to {CA_DAYS}")
        if self.rotate and self.update:
            raise ConfigError("--rotate replaces what --update keeps: give one of them")
        wrong = [host for host in self.hosts if not host or "/" in host or ":/" in host]
        if wrong:
            raise ConfigError(
                f"--hosts takes names and addresses such as replay.example or 10.0.0.5, got "
                f"{wrong[0]!r}"
            )


def make_secrets(options: SecretsOptions) -> int:
    """Write the files and say how to use them. Returns 0.

    Raises:
        ConfigError: there are secrets already (without --rotate or --update) or none (with
            --update), or they cannot be read or written.
    """
    directory = options.directory
    if options.update:
        return _update(directory)
    passwords = {role: secrets.token_urlsafe(PASSWORD_BYTES) for role in ROLES}
    files = {password_file(directory, role).name: f"{passwords[role]}\n" for role in ROLES}
    files[ACL_FILE] = render_acl(passwords)
    files |= certificates(tuple(dict.fromkeys((*options.hosts, *LOCAL))), options.days)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = sorted(name for name in files if (directory / name).exists())
        if there and not options.rotate:
            raise ConfigError(
                f"{directory} already holds {', '.join(there)}: add --update to keep them and add "
                "what a newer release needs, or --rotate to replace all of them, and restart every "
                "process that uses them"
            )
        for name, text in files.items():
            _write(directory / name, text, PUBLIC.get(name, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot write secrets to {directory}: {error}") from error
    for role, spec in ROLES.items():
        path = password_file(directory, role)
        console().print(
            f"{path}: {role}, {spec.purpose}", highlight=False, markup=False, soft_wrap=True
        )
    console().print(
        f"{directory / ACL_FILE}: for the server (aclfile)\n"
        f"{directory / 'server.crt'}, server.key, {CA_FILE}: for the server (tls-cert-file, "
        f"tls-key-file, tls-ca-cert-file); {CA_FILE} alone for everybody else\n"
        f"{directory / 'ca.key'}: signs further certificates; keep it where no server is\n"
        f"To use them: --replay.secrets {directory}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def _update(directory: Path) -> int:
    """Add the roles that are missing, write the ACL file anew, and say what changed. Returns 0."""
    there = [role for role in ROLES if password_file(directory, role).exists()]
    if not there:
        raise ConfigError(f"{directory} holds no passwords to keep: leave out --update")
    try:
        passwords = {role: read_password(password_file(directory, role)) for role in there}
    except ReplayConfigError as error:
        raise ConfigError(str(error)) from error
    added = [role for role in ROLES if role not in there]
    passwords |= {role: secrets.token_urlsafe(PASSWORD_BYTES) for role in added}
    try:
        for role in added:
            _write(password_file(directory, role), f"{passwords[role]}\n", 0o600)
        _write(directory / ACL_FILE, render_acl(passwords), 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write secrets to {directory}: {error}") from error
    names = ", ".join(f"{password_file(directory, role).name}" for role in added)
    console().print(
        f"{directory}: added {names or 'no role'}; {ACL_FILE} says anew what each role may do. "
        "Restart the server, or send it ACL LOAD",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def certificates(hosts: tuple[str, ...], days: int) -> dict[str, str]:
    """Return a new CA and a server certificate that it signed, as PEM by file name.

    Args:
        hosts: names and addresses that the certificate is valid for.
        days: how long it is valid.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    # A server whose clock is somewhat behind must accept it too.
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)

    def draft(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, valid_days: int) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=valid_days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False
            )
        )

    name = "dreamfleet replay CA"
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = {name: False for name in _KEY_USAGES}
    ca = (
        draft(name, name, ca_key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.KeyUsage(**usage | {"key_cert_sign": True, "crl_sign": True}), True)
        .sign(ca_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    server = (
        draft("dreamfleet replay", name, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(x509.KeyUsage(**usage | {"digital_signature": True}), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(names, False)
        .sign(ca_key, hashes.SHA256())
    )

    def private(secret: ec.EllipticCurvePrivateKey) -> str:
        return secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()

    pem = serialization.Encoding.PEM
    return {
        CA_FILE: ca.public_bytes(pem).decode(),
        "ca.key": private(ca_key),
        "server.crt": server.public_bytes(pem).decode(),
        "server.key": private(key),
    }


_KEY_USAGES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
    "key_cert_sign crl_sign encipher_only decipher_only"
).split()


def _general_name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, text: str, mode: int) -> None:
    """Replace a file in one step; it never exists with a wider mode."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(partial, path)
