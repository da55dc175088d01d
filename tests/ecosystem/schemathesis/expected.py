"""For schemathesis: the reasons for which a request that fits the schema may be refused, and what a 404 is about."""

import schemathesis
from schemathesis.specs.openapi.checks import ensure_resource_availability

EXPECTED = {
    "unknown_characters",  # the charset is the model's
    "out_of_range",  # a position in a text, or two fields that exclude each other
    "invalid_state", "state_expired", "state_model_mismatch",  # a state is signed
    "session_gone", "position_gone",  # it was there
    "unsupported_value",  # a chat of a model without a template, a field that only its neutral value may have
}  # fmt: skip


@schemathesis.check
def refusal_is_meant(ctx, response, case) -> None:  # noqa: ARG001 - schemathesis calls it so
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive or response.status_code not in (400, 410):
        return
    code = response.json()["error"]["code"]
    assert code in EXPECTED, f"a request that fits the schema was refused with {code}: {response.text[:500]}"


@schemathesis.check
def created_session_is_found(ctx, response, case) -> bool | None:
    """As `ensure_resource_availability`, but where a session is fed with `rebase`, a 404 may be that of a model."""
    if response.status_code == 404 and response.json()["error"]["code"] == "model_not_found":
        return None
    return ensure_resource_availability(ctx, response, case)
