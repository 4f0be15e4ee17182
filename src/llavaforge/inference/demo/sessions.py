"""The models of a page, and what each open page has asked them.

Comes in: image files and questions. Goes out: answers as they are made.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from llavaforge.answers.generate import Answerer
from llavaforge.inference.conversation import Conversation

_PATIENCE_S = 0.1  # how long the first words are waited for


@dataclass
class Session:
    """What one open page has asked.

    Attributes:
        conversations: one per model.
        image: the file that they are about.
        stop: set when the answer is to end.
    """

    conversations: list[Conversation]
    image: bytes | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def show(self, image: bytes | None) -> None:
        """Take the image that is on the page; another one than before begins a new conversation.

        Raises:
            UserError: it is no image that can be decoded.
        """
        if image == self.image:
            return
        self.reset()
        if image is not None:
            for conversation in self.conversations:
                conversation.show(image, "the image")
        self.image = image

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.image = None
        for conversation in self.conversations:
            conversation.reset()


class Models:
    """The models of a page, which answer one question at a time.

    Args:
        titles: what the page calls them.
        answerers: one per title.
    """

    def __init__(self, titles: list[str], answerers: list[Answerer]) -> None:
        self.titles = titles
        self._answerers = answerers
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._sessions: dict[str, Session] = {}

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions.values():
            session.stop.set()
        self._worker.shutdown()

    def session(self, key: str) -> Session:
        """Return what the page of that key has asked."""
        if key not in self._sessions:
            self._sessions[key] = Session([Conversation(answerer) for answerer in self._answerers])
        return self._sessions[key]

    def close(self, key: str) -> None:
        """Forget a page that was closed; an answer to it ends."""
        if key in self._sessions:
            self._sessions.pop(key).stop.set()

    def answer(self, session: Session, number: int, question: str) -> Iterator[str]:
        """Yield a model's answer as far as it is made, longer each time, and last of all whole.

        What is yielded first is empty where nothing is made yet after a moment. (A page shows the question and the
        first words in one update if it can, since an update costs it as much as a small model's first token.)

        Args:
            session: `session.stop` ends the answer; what was made by then is remembered as the answer.
            number: of the model.
            question: about the session's image.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        conversation = session.conversations[number]
        made = self._worker.submit(conversation.ask, question, pieces.put, session.stop.is_set)
        made.add_done_callback(lambda _: pieces.put(None))
        text = ""
        try:
            with suppress(Empty):
                text = pieces.get(timeout=_PATIENCE_S) or ""
            yield text
            while not made.done() and (piece := pieces.get()) is not None:
                text += piece
                if pieces.empty():
                    yield text
            yield made.result()
        finally:
            if not made.done():  # the page is gone
                session.stop.set()
