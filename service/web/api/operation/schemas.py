"""The bodies and queries of the routes for operators and balancers, and the bodies of the answers.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.web.api.schemas import Body


class ReadyQuery(BaseModel):
    """Query parameters of /readyz."""

    model_config = ConfigDict(extra="forbid")

    part: Literal["all", "completions"] = Field(
        "all", description="what to check: everything, or only what completions need"
    )
    unready: Literal["503", "404"] = Field(
        "503", description="status while requests can't be served; HAProxy lets running answers finish after a 404"
    )


class HealthAnswer(BaseModel):
    """The process runs."""

    status: Literal["ok"]


class VersionAnswer(BaseModel):
    """The server's version."""

    version: str = Field(examples=["0.9.0"])


class ReadyAnswer(BaseModel):
    """Requests can be served."""

    status: Literal["ready"]
    kernel: str = Field(
        description="what computes the steps: a variant of the C++ kernel, named after its instruction set, or torch. "
        "It is not part of `system_fingerprint`, because all variants give the same bits",
        examples=["avx512vnni"],
    )


class ReloadBody(Body):
    """An empty object: `{}`."""


class ServedName(BaseModel):
    """A model name, and the version that requests for it get."""

    name: str = Field(description="the name, as clients send it in `model`")
    model: str = Field(description="name@version that is served under this name")
    failed: str | None = Field(
        description="name@version that should be served but can't be loaded; null if there is none, or if the store "
        "can't say which"
    )
    code: str | None = Field(description="code of the error that keeps a newer version from being served, or null")


class ReloadAnswer(BaseModel):
    """Every model name that was requested since the server started."""

    data: list[ServedName]
