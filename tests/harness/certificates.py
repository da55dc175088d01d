"""A certificate authority of a test's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.harness.programs import program


class Authority:
    """Signs certificates. Each has a file NAME.crt and a file NAME.key in its directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.certificate = directory / "ca.crt"
        self._run(
            "req", "-x509", *self._key("ca"), "-out", str(self.certificate), "-subj", "/CN=authority", "-days", "2"
        )

    def sign(self, name: str, *names: str) -> tuple[Path, Path]:
        """Return the files of a new certificate and of its key. names: such as `DNS:localhost` or `IP:127.0.0.1`."""
        request, extensions = self._directory / f"{name}.csr", self._directory / f"{name}.ext"
        certificate, own_key = self._directory / f"{name}.crt", self._directory / "ca.key"
        extensions.write_text(f"subjectAltName={','.join(names)}\n" if names else "")
        self._run("req", "-new", *self._key(name), "-out", str(request), "-subj", f"/CN={name}")
        self._run(
            "x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(own_key),
            "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(certificate),
        )  # fmt: skip
        return certificate, self._directory / f"{name}.key"

    def _key(self, name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        return [*curve, "-nodes", "-keyout", str(self._directory / f"{name}.key")]

    def _run(self, *arguments: str) -> None:
        subprocess.run([program("openssl"), *arguments], check=True, capture_output=True)
