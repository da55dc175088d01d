"""Short texts on the thread of their caller."""

from __future__ import annotations

from collections.abc import Sequence

from service.engine.guarded_stepper import GuardedStepper
from service.engine.request import Request
from service.engine.short_text import ReadText, ShortText
from service.engine.stepper import InvalidRows
from service.engine.texts import Text

NOT_COMPUTABLE = "the engine can't compute this request: the server's log has the reason"

_MAX_CHARS = 32  # of each text: reading more takes longer than waking a thread
_MAX_TEXTS = 128
_MAX_TOTAL_CHARS = 2048  # of all texts together: others wait as long as for a tick with hundreds of texts


class AtOnce:
    """Steps short texts that are only read on the thread that submits them, while the engine is idle.

    Waking the engine's thread, and being woken by it, would take longer than reading them.
    """

    def __init__(self, stepper: GuardedStepper) -> None:
        self._stepper = stepper

    def begin(self, requests: Sequence[Request]) -> bool:
        """Take the stepper if these texts are few and short, and no other thread has it. Then call `step`."""
        if any(request.max_chars for request in requests):
            return False
        return self._are_short([len(request.prompt) for request in requests]) and self._take()

    def begin_reading(self, texts: Sequence[ShortText]) -> bool:
        """Take the stepper as `begin` does, if it reads short texts. Then call `read`."""
        return self._stepper.reads_short_texts and self._are_short([len(text.ids) for text in texts]) and self._take()

    def read(self, texts: Sequence[ShortText]) -> list[ReadText]:
        """Read texts to their ends, and let go of the stepper. Raises EngineFailed."""
        try:
            return self._stepper.read(texts)
        finally:
            self._stepper.lock.release()

    def _are_short(self, lengths: Sequence[int]) -> bool:
        return 0 < len(lengths) <= _MAX_TEXTS and max(lengths) <= _MAX_CHARS and sum(lengths) <= _MAX_TOTAL_CHARS

    def _take(self) -> bool:
        return self._stepper.lock.acquire(blocking=False)

    def step(self, texts: Sequence[Text]) -> None:
        """Step texts to their end, publish that, and let go of the stepper. Raises EngineFailed."""
        try:
            while texts:
                try:
                    results = self._stepper.advance([text.row for text in texts], _MAX_CHARS)
                    break
                except InvalidRows as invalid:
                    for text in texts:
                        if text.row in invalid.causes:
                            text.handle.fail(NOT_COMPUTABLE)
                    texts = [text for text in texts if text.row not in invalid.causes]
            else:
                return
        finally:
            self._stepper.lock.release()
        for text, result in zip(texts, results, strict=True):
            if not result.is_empty:
                text.handle.publish(result)
            text.handle.publish_end(text.end(text.row.finished or "length"))
