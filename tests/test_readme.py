"""What README, docs and recipes tell a user to type is understood as typed, and what they name is there."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from llavaforge.cli import VERBS, parse
from llavaforge.config.recipe import training_stages
from llavaforge.config.schema import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def commands(text: str) -> list[list[str]]:
    """Every `llavaforge ...` command of a text without comments and line continuations; run.sh is a `train`."""
    joined = re.sub(r"\\\n\s*", " ", text)
    start = r"torchrun .*? -m llavaforge|srun llavaforge|llavaforge|sbatch .*?\brun\.sh"
    found = re.findall(rf"^[#\s$]*({start}) +(.+?)(?:  +\(.*)?$", joined, flags=re.M)
    return [
        [*(["train"] if start.startswith("sbatch") else []), *shlex.split(line, comments=True)] for start, line in found
    ]


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*PAGES, *RECIPES]
COMMANDS = [(path.name, words) for path in SOURCES for words in commands(path.read_text())]


def test_there_are_commands_to_check() -> None:
    counts = Counter(name for name, _ in COMMANDS)
    least = {"README.md": 5, "training.md": 14, "using.md": 6, "data.md": 2, "scaling.md": 8}
    assert all(counts[name] >= number for name, number in least.items()), counts
    typed = {" ".join(words[:2]) if words[0] == "data" else words[0] for _, words in COMMANDS}
    assert VERBS.keys() - typed == {"quickstart"}  # `make demo` runs it


@pytest.mark.parametrize(
    ("source", "words"), COMMANDS, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value
)
def test_every_command_is_understood(source: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    assert name in VERBS, f"{source}: {words}"
    parse(name, words[len(name.split()) :])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_says_how_it_is_started(recipe: Path) -> None:
    verb = "compare" if recipe.name.startswith("compare-") else "train"
    config = parse(verb, [str(recipe)])
    assert isinstance(config, TrainConfig)
    training_stages(config)
    assert f"llavaforge {verb} recipes/{recipe.name}" in recipe.read_text()


def test_recipes_have_llavas_published_hyper_parameters() -> None:
    stage1 = parse("train", [str(ROOT / "recipes/stage1-projector.yaml")]).model_dump()
    assert (stage1["learning_rate"], stage1["global_batch_size"], stage1["warmup_ratio"]) == (1e-3, 256, 0.03)
    for kind, rate in (("full", 2e-5), ("freeze_vision", 2e-5), ("use_lora", 2e-4)):
        stage2 = parse("train", [str(ROOT / f"recipes/stage2-{kind}.yaml")]).model_dump()
        assert (stage2["train_type"], stage2["learning_rate"], stage2["global_batch_size"]) == (kind, rate, 128)
    assert (stage2["lora_r"], stage2["lora_alpha"], stage2["projector_learning_rate"]) == (128, 256, 2e-5)


def test_the_tree_names_what_is_there_and_nothing_else() -> None:
    tree = re.search(r"```\n(src/llavaforge/.*?)```", (ROOT / "docs/layout.md").read_text(), flags=re.S)
    assert tree is not None
    entries = re.findall(r"^( *)([\w./]+)(?=\s{2,}\S)", tree[1], flags=re.M)
    package = ROOT / "src/llavaforge"
    for indent, folder in ((2, package), (4, package / "data")):
        named = {name for spaces, name in entries if len(spaces) == indent}
        there = {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
        there |= {path.name for path in package.glob("[a-z]*.py") if folder == package}
        assert named == there
    for _, name in (entry for entry in entries if not entry[0]):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_and_the_doors_it_names_are_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)|<img src=\"([^\"]+)\"", text)
    for link in (link for pair in links for link in pair if link):
        assert (page.parent / link).exists(), link
    doors = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.M)) <= doors
    for name in re.findall(r"recipes/[\w./-]+", text):
        assert (ROOT / name.rstrip(".")).exists(), name
