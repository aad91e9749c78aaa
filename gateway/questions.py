"""What this worker remembers of a request, told to whoever asks where an answer came from."""

import asyncio
import logging
from typing import Final

from gateway.receipts import Receipts
from rollout.errors import StoreUnavailableError
from rollout.stores.questions import QuestionStore

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 0.5


async def answer_questions(store: QuestionStore, receipts: Receipts) -> None:
    """Answer every question, for ever; who knows nothing says so, and nobody waits for it."""
    position: str | None = None
    while True:
        try:
            if position is None:
                position = await store.newest()
            for entry, question, request_id in await store.asked(position):
                await store.answer(question, receipts.of_request(request_id))
                position = entry
        except StoreUnavailableError:
            await asyncio.sleep(_RETRY_SECONDS)
        except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
            _log.exception("a question could not be answered")
            position = None
            await asyncio.sleep(_RETRY_SECONDS)
