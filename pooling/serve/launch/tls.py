# SPDX-License-Identifier: Apache-2.0
"""TLS of the port, by vLLM's `--ssl-*` flags: what uvicorn is given, and certificates that are taken anew."""

from __future__ import annotations

import ssl
from argparse import Namespace
from typing import Any

import uvicorn
from uvicorn.config import SSL_PROTOCOL_VERSION, create_ssl_context

from tokenpool.errors import ConfigError

_FILES = {"--ssl-certfile": "ssl_certfile", "--ssl-keyfile": "ssl_keyfile", "--ssl-ca-certs": "ssl_ca_certs"}


def tls_options(args: Namespace) -> dict[str, Any]:
    """The keywords of `uvicorn.Config` that vLLM's flags in `args` ask for."""
    return {
        "ssl_keyfile": args.ssl_keyfile,
        "ssl_certfile": args.ssl_certfile,
        "ssl_ca_certs": args.ssl_ca_certs,
        "ssl_cert_reqs": args.ssl_cert_reqs,
        "ssl_ciphers": args.ssl_ciphers,
    }


def check_tls(args: Namespace) -> None:
    """Refuse files and ciphers with which the port could not answer; raises ConfigError that names the flag."""
    given = {flag: path for flag, dest in _FILES.items() if (path := getattr(args, dest))}
    if args.enable_ssl_refresh and not {"--ssl-certfile", "--ssl-keyfile"} <= given.keys():
        raise ConfigError("needs --ssl-certfile and --ssl-keyfile, whose files it watches", key="--enable-ssl-refresh")
    if not given and args.ssl_ciphers:
        raise ConfigError("needs --ssl-certfile: without it the port speaks no TLS", key="--ssl-ciphers")
    if given and "--ssl-certfile" not in given:
        raise ConfigError("needs --ssl-certfile beside it", key=next(iter(given)))
    for flag, path in given.items():
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}", key=flag) from error
    if given:
        _try_files(args, given)


def _try_files(args: Namespace, given: dict[str, str]) -> None:
    def context(ca_certs: str | None, ciphers: str | None) -> None:
        create_ssl_context(
            args.ssl_certfile, args.ssl_keyfile, None, SSL_PROTOCOL_VERSION, args.ssl_cert_reqs, ca_certs, ciphers
        )

    attempts = [
        (", ".join(flag for flag in given if flag != "--ssl-ca-certs"), None, None),
        ("--ssl-ca-certs", args.ssl_ca_certs, None),
        ("--ssl-ciphers", None, args.ssl_ciphers),
    ]
    for flag, ca_certs, ciphers in attempts:
        try:
            context(ca_certs, ciphers)
        except (OSError, ValueError) as error:  # ssl.SSLError is the first, a bad --ssl-cert-reqs the second
            key = "--ssl-cert-reqs" if isinstance(error, ValueError) and not isinstance(error, ssl.SSLError) else flag
            raise ConfigError(f"cannot be used: {error}", key=key) from error


class CertificateRefresh:
    """Takes certificates of a running port anew when their files change, if `--enable-ssl-refresh` is given."""

    def __init__(self, args: Namespace, config: uvicorn.Config) -> None:
        self._args = args
        self._config = config
        self._refresher: Any = None

    async def __aenter__(self) -> None:
        if not self._args.enable_ssl_refresh:
            return
        # The module imports a watcher of files, which nobody else needs.
        from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

        if not self._config.loaded:
            self._config.load()
        assert self._config.ssl is not None
        args = self._args
        self._refresher = SSLCertRefresher(self._config.ssl, args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs)

    async def __aexit__(self, *_: object) -> None:
        if self._refresher is not None:
            self._refresher.stop()
