"""The pages of the documentation's site that are written from something else (a hook of mkdocs).

Comes in: README.md and its neighbours, the table of verbs, the schema of their options. Goes out: pages of Markdown, by
their places in the site.
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).parent.parent
_BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
}
_REPOSITORY = ("LICENSE",)  # files that the site does not show


def pages() -> dict[str, str]:
    """Return every page that is not a file of docs/, by its place."""
    texts = {place: _moved((ROOT / name).read_text()) for name, place in _BESIDE.items()}
    return texts | _verb_pages()


def _moved(text: str) -> str:
    """Return a page of the root with links as they are from within docs/."""
    text = re.sub(r'(\]\(|src=")docs/', r"\1", text)
    for name, place in _BESIDE.items():
        text = text.replace(f"]({name})", f"]({place})")
    for name in _REPOSITORY:
        text = re.sub(rf"\[([^\]]*)\]\({name}\)", r"\1", text)
    return text


def _verb_pages() -> dict[str, str]:
    from llavaforge.cli import VERBS
    from llavaforge.config import schema

    rows = [f"| [`{name}`]({_file(name)}) | {verb.summary} |" for name, verb in VERBS.items()]
    found = {"verbs/index.md": "\n".join(["# Verbs", "", "| verb | |", "|---|---|", *rows, ""])}
    for name, verb in VERBS.items():
        options = getattr(schema, verb.schema)
        recipe = "[RECIPE] " if verb.takes_recipe else ""
        lines = [f"# {name}", "", options.__doc__ or verb.summary, "", "```"]
        lines += [f"llavaforge {name} {recipe}[--option VALUE ...]", "```", ""]
        if verb.takes_recipe:
            lines += ["A recipe is a YAML file with these keys; an option on the command line overrides its key.", ""]
        lines += [_option(field, info) for field, info in options.model_fields.items()]
        found[f"verbs/{_file(name)}"] = "\n".join([*lines, ""])
    return found


def _file(verb: str) -> str:
    return f"{verb.replace(' ', '-')}.md"


def _option(field: str, info: Any) -> str:
    default = "required" if info.is_required() else f"default `{info.get_default()}`"
    takes = ", ".join(_words(info.annotation))
    return f"**`--{field}`** ({takes}; {default})\n:   {' '.join((info.description or '').split())}\n"


_WORDS: dict[Any, str] = {str: "text", Path: "path", int: "number", float: "number", bool: "true or false"}


def _words(annotation: Any) -> list[str]:
    """Return what an option takes in a user's words: `text`, `path`, choices; of a list what is in it."""
    if annotation in _WORDS:
        return [_WORDS[annotation]]
    if hasattr(annotation, "__metadata__"):
        return _words(annotation.__origin__)
    if get_origin(annotation) is Literal:
        return [f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in get_args(annotation)]
    if get_origin(annotation) is list:
        return [f"a list of {' or '.join(_words(get_args(annotation)[0]))}"]
    parts = [word for one in get_args(annotation) if one is not type(None) for word in _words(one)]
    return list(dict.fromkeys(parts)) or ["a mapping"]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages; mkdocs calls this."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page of docs/ with its links out of docs/ as they are on the site; mkdocs calls this."""
    for name, place in _BESIDE.items():
        markdown = markdown.replace(f"](../{name})", f"]({place})")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)  # what the site does not have
