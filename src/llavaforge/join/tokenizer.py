"""The language model's tokenizer, made ready for images: `<image>`, a pad token and a chat template.

Comes in: the language model's folder. Goes out: its tokenizer with what was missing, and the id of `<image>`. Whatever
is defaulted is said in a warning.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from llavaforge.errors import UserError, reading, reason
from llavaforge.model_folder.chat_template import bounded_rendering, default_chat_template

log = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def prepare_tokenizer(folder: Path, chat_template: Path | None) -> tuple[Any, int]:
    """Load a language model's tokenizer and add what a LLaVA needs; a Jinja file may replace its chat template.

    Returns:
        The tokenizer, and the id of `<image>`: the one it has already, else the next free one.

    Raises:
        UserError: no tokenizer, or a faulty chat template.
    """
    tokenizer = load_tokenizer(folder)
    image_token_id = _add_image_token(tokenizer, folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        log.warning("%s: the tokenizer has no pad token; %r pads (masked, never learnt).", folder, tokenizer.pad_token)
    tokenizer.chat_template = _chat_template(tokenizer, folder, chat_template)
    return tokenizer, image_token_id


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's own tokenizer.

    Raises:
        UserError: there is none, or it is not a fast one.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make an empty one
        raise UserError(f"{folder}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)}). Copy the model's own into it.")
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            raise UserError(
                f"{folder}: has its tokenizer as tokenizer.model only. `pip install sentencepiece protobuf` reads it "
                "(and the joined model gets a tokenizer.json)."
            )
    with reading(folder, "It is the tokenizer that does not load. Copy its tokenizer.json again."):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only a slow tokenizer; a tokenizer.json is needed.")
    return tokenizer


def _add_image_token(tokenizer: Any, folder: Path) -> int:
    had = IMAGE_TOKEN in tokenizer.get_vocab()
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    if IMAGE_TOKEN not in extra:
        token = AddedToken(IMAGE_TOKEN, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    log.info("%s: `%s` %s id %d.", folder, IMAGE_TOKEN, "has already" if had else "takes the next free", image_token_id)
    return image_token_id


def _chat_template(tokenizer: Any, folder: Path, given: Path | None) -> str:
    if given is not None:
        if not given.is_file():
            raise UserError(f"{given}: no such chat template file.")
        with reading(given, "Give a Jinja template in UTF-8."):
            template = given.read_text(encoding="utf-8")
        conversation = [{"role": "user", "content": "What?"}]
        try:
            with bounded_rendering():
                render_jinja_template([conversation], chat_template=template, **tokenizer.special_tokens_map)
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(f"{given}: does not render a simple question ({reason(error)}). Correct it.") from None
        return template
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several named ones; `default` is the one for plain conversations
        own = own.get("default")
    if own:
        return str(own)
    default = default_chat_template(tokenizer)
    log.warning("%s: the tokenizer has no chat template; ChatML is used (--chat_template FILE sets another).", folder)
    return default
