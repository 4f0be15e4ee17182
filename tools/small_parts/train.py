"""Train the two small parts of `llavaforge quickstart` on the generated world alone.

In: the numbers of steps. Out: `small-clip/` and `small-qwen2/` in the output folder, as `src/llavaforge/starter/` holds
them. Run it by hand, from the root of the repository, when the world changes (25 minutes on one core):

    python -m tools.small_parts.train --output_dir src/llavaforge/starter

Only scenes of the train split are read, so that a held-out image of any data set shows a scene that is new to
both parts.
"""

import argparse
import logging
from pathlib import Path

from tools.small_parts.small_language_model import build_tokenizer, train_language_model
from tools.small_parts.small_tower import train_tower


def main() -> None:
    """Read the command line and train one part or both."""
    parser = argparse.ArgumentParser(description="Train the small parts of llavaforge quickstart.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--part", choices=("small-clip", "small-qwen2", "both"), default="both")
    parser.add_argument("--tower_steps", type=int, default=1500)
    parser.add_argument("--language_model_steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tokenizer = build_tokenizer(args.seed)
    if args.part != "small-qwen2":
        train_tower(tokenizer, args.output_dir / "small-clip", args.tower_steps, seed=args.seed)
    if args.part != "small-clip":
        folder = args.output_dir / "small-qwen2"
        train_language_model(tokenizer, folder, args.language_model_steps, seed=args.seed)


if __name__ == "__main__":
    main()
