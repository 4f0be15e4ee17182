"""The page of `llavaforge demo`, in Gradio.

Comes in: the models and the held-out samples. Goes out: a page under an address. It loads nothing from elsewhere, and
answers and questions are shown as text, not as HTML or Markdown.
"""

import html
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from llavaforge.config.schema import DemoConfig
from llavaforge.data.pixels.decode import decode
from llavaforge.data.rows.turns import IMAGE_PLACEHOLDER
from llavaforge.errors import UserError, is_out_of_memory
from llavaforge.inference.conversation import Conversation
from llavaforge.inference.demo.samples import HeldOut
from llavaforge.inference.demo.sessions import Models

_CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_SHORTEST_PAUSE_S = 0.04  # between two updates of the page, which would slow the model down
_MOST_ASKING = 10  # pages at once; each takes one of Gradio's forty threads
_THUMBNAIL = 320  # pixels
_LONGEST_QUESTION = 4000  # characters
_FONTS = {
    "font": ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
    "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"],
}


@contextmanager
def serving(models: Models, samples: Sequence[HeldOut], config: DemoConfig) -> Iterator[str]:
    """Serve the page while the block runs, and give its address."""
    logging.getLogger("gradio").setLevel(logging.WARNING)
    page = _page(models, samples)
    page.queue(max_size=20)
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            allowed_paths=[],
            max_file_size=f"{config.max_upload_mb}mb",
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", **_FONTS),
            css=_CSS,
        )
        yield address
    finally:
        page.close(verbose=False)


def _page(models: Models, samples: Sequence[HeldOut]) -> Any:
    with gr.Blocks(title="llavaforge demo", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## llavaforge demo", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"],
                    height=300, elem_id="image", buttons=[],
                )  # fmt: skip
                gallery = _gallery(samples)
            with gr.Column(scale=5 if len(models.titles) > 1 else 3):
                with gr.Row():
                    chats = [_chat(number, title) for number, title in enumerate(models.titles)]
                with gr.Row(elem_id="ask-row"):
                    question = gr.Textbox(
                        placeholder="Ask about the image", show_label=False, container=False, scale=6, autofocus=True,
                        max_lines=4, max_length=_LONGEST_QUESTION, elem_id="question",
                    )  # fmt: skip
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
                    clear = gr.Button("Clear", scale=1, min_width=90, elem_id="clear")
                reference = gr.Textbox(
                    label="The sample's reference answer", visible=False, interactive=False, elem_id="reference"
                )
        handlers = _Handlers(models, samples)
        outputs = [*chats, question, ask, stop, clear]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        # Pages wait for the models (`Models`), with what they asked on them, not here, where nothing would show it.
        asked, most = [ask.click, question.submit], _MOST_ASKING
        gr.on(asked, handlers.ask, [image, question], outputs, concurrency_limit=most, **private)
        at_once = {**private, "queue": False}
        stop.click(handlers.stop, None, None, **at_once)
        clear.click(handlers.clear, None, [*chats, image, question, reference], **at_once)
        gr.on([image.upload, image.clear], lambda: gr.update(visible=False), None, reference, **at_once)
        if gallery is not None:
            gallery.select(handlers.choose, None, [image, question, reference], **at_once)
        page.unload(handlers.close)
    return page


def _chat(number: int, title: str) -> Any:
    return gr.Chatbot(
        label=title, height=460, elem_id=f"chat-{number}", render_markdown=False, allow_tags=False, buttons=[],
        feedback_options=None, layout="bubble", placeholder="Choose an image, then ask.",
    )  # fmt: skip


def _gallery(samples: Sequence[HeldOut]) -> Any:
    if not samples:
        return None
    pictures = [_picture(sample) for sample in samples]
    gr.Markdown("Held-out samples", elem_id="samples-title")
    for picture in pictures:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return gr.Gallery(
        pictures, show_label=False, container=False, columns=4, object_fit="cover", height="auto", allow_preview=False,
        interactive=False, format="png", buttons=[], elem_id="samples",
    )  # fmt: skip


def _picture(sample: HeldOut) -> Image.Image:
    return decode(sample.image, "a held-out sample")


class _Handlers:
    """What happens when something on the page is pressed; `request.session_hash` tells open pages apart."""

    def __init__(self, models: Models, samples: Sequence[HeldOut]) -> None:
        self._models = models
        self._samples = samples

    def ask(self, image: str | None, question: str, request: gr.Request) -> Iterator[list[Any]]:
        """Show the question, then the answers as they are made."""
        session, question = self._models.session(str(request.session_hash)), question.strip()
        if not question or len(question) > _LONGEST_QUESTION:
            raise gr.Error(f"Type a question of at most {_LONGEST_QUESTION} characters.", print_exception=False)
        session.stop.clear()
        failed = None
        try:
            session.show(Path(image).read_bytes() if image else None)
            chats = [[*_messages(one), _message("user", question)] for one in session.conversations]
            update = [*chats, "", *_buttons(is_answering=True)]
            for number, chat in enumerate(chats):
                if session.stop.is_set():
                    break
                for text in self._models.answer(session, number, question):
                    update[number] = [*chat, _message("assistant", text)] if text else chat
                    yield update
                    update = [gr.skip()] * len(update)
                    time.sleep(_SHORTEST_PAUSE_S)
        except Exception as error:
            failed = error
        remembered = [_messages(conversation) for conversation in session.conversations]
        yield [*remembered, question if failed else gr.skip(), *_buttons(is_answering=False)]
        if failed:
            raise _told(failed) from failed

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being made."""
        self._models.session(str(request.session_hash)).stop.set()

    def clear(self, request: gr.Request) -> list[Any]:
        """Begin anew."""
        self._models.session(str(request.session_hash)).reset()
        return [*([] for _ in self._models.titles), None, "", gr.update(visible=False)]

    def choose(self, event: gr.SelectData) -> tuple[Image.Image, str, Any]:
        """Put a held-out sample on the page."""
        sample = self._samples[event.index]
        return _picture(sample), sample.question, gr.update(value=sample.answer, visible=True)

    def close(self, request: gr.Request) -> None:
        """Forget a page."""
        self._models.close(str(request.session_hash))


def _buttons(is_answering: bool) -> list[Any]:
    """Return Ask, Stop and Clear as they are while a question is answered, and at other times."""
    return [
        gr.update(visible=not is_answering), gr.update(visible=is_answering), gr.update(interactive=not is_answering)
    ]  # fmt: skip


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [_message(turn.role, turn.text.replace(IMAGE_PLACEHOLDER, "").strip()) for turn in conversation.turns]


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": html.escape(text, quote=False)}  # Gradio takes tags for HTML, Markdown or not


def _told(error: Exception) -> Exception:
    if isinstance(error, UserError):
        return gr.Error(str(error), print_exception=False)
    if is_out_of_memory(error):
        return gr.Error("Out of memory: ask less at once, or press Clear.")
    return error
