"""A `Preview` as terminal text: the first samples in full, the micro-batches as bars of block characters.

Comes in: a `Preview`. Goes out: text on a rich console.
"""

from collections.abc import Iterator
from itertools import chain

from rich.console import Console
from rich.text import Text

from llavaforge.data_preview.cards import Bar, Card, Preview, Segment
from llavaforge.data_preview.tokens import TokenGroup
from llavaforge.report.glyphs import visible
from llavaforge.report.page import count

_MOST_CARDS, _MOST_BARS, _MOST_FAULTS = 3, 12, 3
_WIDTH, _NUMBERS_WIDTH = 120, 53
_SUPERVISED = "black on green"
_IMAGE, _PROMPT, _LEARNT, _BORDER = "▓", "░", "█", "│"
_STYLES = {_IMAGE: "magenta", _LEARNT: "green", _BORDER: "bold"}


def show(preview: Preview, console: Console, more_in: str | None) -> None:
    """Print a preview.

    Args:
        preview: what to show.
        console: for people; outside a terminal the supervised text stands in [[ ]] instead of green.
        more_in: the page that shows the rest, if one is written.
    """
    parts = (
        _head(preview),
        _cards(preview, console.is_terminal, more_in),
        _packing(preview, min(console.width, _WIDTH) if console.is_terminal else _WIDTH),
    )
    for line in chain(*parts):
        console.print(line, soft_wrap=True)


def _head(preview: Preview) -> Iterator[Text]:
    width = max(map(len, preview.facts)) + 2
    for name, value in preview.facts.items():
        yield Text.assemble((name.ljust(width), "dim"), visible(value))
    if len(preview.data_sets) > 1:
        for name, records, samples, supervised in preview.data_sets:
            yield Text(f"  {visible(name)}: {records:,} records, {samples:,} samples, {supervised:,} supervised tokens")
    if preview.faults:
        yield Text(f"{_counted(len(preview.faults), 'faulty record')}; see `llavaforge data check`:", "bold red")
        for fault in preview.faults[:_MOST_FAULTS]:
            yield Text(f"  {visible(str(fault))}")


def _cards(preview: Preview, is_terminal: bool, more_in: str | None) -> Iterator[Text]:
    for card in preview.cards[:_MOST_CARDS]:
        yield Text()
        yield from _card(card, is_terminal)
    if (num_more := len(preview.cards) - _MOST_CARDS) > 0:
        yield Text()
        yield Text(f"{num_more} more samples are in {more_in}" if more_in else f"--output FILE shows {num_more} more")


def _packing(preview: Preview, width: int) -> Iterator[Text]:
    yield Text()
    names = ((_IMAGE, "image"), (_PROMPT, "prompt"), (_LEARNT, "supervised"), (_BORDER, "next sample"))
    legend = Text().append("Packing (step.micro-batch): ", "bold")
    for sign, name in names:
        legend.append(sign, _STYLES.get(sign, "")).append(f" {name}  ")
    yield legend
    for bar in preview.bars[:_MOST_BARS]:
        yield _bar(bar, preview.most_tokens, max(20, width - _NUMBERS_WIDTH))
    if (num_more := len(preview.bars) + preview.num_more_bars - _MOST_BARS) > 0:
        yield Text(f"... and {count(num_more)} more micro-batches")


def _card(card: Card, is_terminal: bool) -> Iterator[Text]:
    numbers = f"{count(card.length)} tokens, {count(card.num_supervised)} supervised"
    yield Text(visible(f"Sample {card.number}: {card.id or card.where} ({numbers})"), "bold")
    yield Text(visible(f"{card.data_set}, {card.where}; step {card.position.step}.{card.position.micro_batch}"), "dim")
    if card.shortened:
        yield Text(card.shortened, "yellow")
    for picture in card.pictures:
        seen = picture.url is not None
        yield Text(visible(f"{picture.name}: {picture.caption}" if seen else picture.caption), "dim" if seen else "red")
    text, was_supervised = Text(), False
    for group in [*card.groups, TokenGroup("", ())]:
        if group.is_supervised != was_supervised and not is_terminal:
            text.append("[[" if group.is_supervised else "]]")
        was_supervised = group.is_supervised
        num_tokens = group.num_image_tokens
        text.append(f"{group.text} x {num_tokens}" if num_tokens else visible(group.text), _style(group))
    text.rstrip()
    yield text


def _style(group: TokenGroup) -> str:
    if group.is_supervised:
        return _SUPERVISED
    return "reverse magenta" if group.num_image_tokens else "yellow" if group.is_special else ""


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _bar(bar: Bar, most_tokens: int, width: int) -> Text:
    cells = _cells(bar.segments, most_tokens / width)
    text = Text(f"{bar.position.step}.{bar.position.micro_batch}".rjust(7) + " ")
    for cell in cells.ljust(width):
        text.append(cell, _STYLES.get(cell, ""))
    tokens, supervised, samples = bar.num_tokens, bar.total("supervised"), len(bar.segments)
    return text.append(f" {tokens:>6,} tokens {supervised:>6,} supervised  {_counted(samples, 'sample')}")


def _cells(segments: list[Segment], tokens_per_cell: float) -> str:
    """Return one character per cell; a kind of tokens has the cells whose middle lies in it."""
    cells, end = "", 0
    for number, segment in enumerate(segments):
        begin = len(cells)
        for sign, tokens in ((_IMAGE, segment.image), (_PROMPT, segment.prompt), (_LEARNT, segment.supervised)):
            end += tokens
            cells += sign * (round(end / tokens_per_cell) - len(cells))
        if number and len(cells) > begin:
            cells = cells[:begin] + _BORDER + cells[begin + 1 :]
    return cells
