"""What the task asks, and how it is judged: whether an answer is llavaforge's own."""

from typing import Any

from PIL import Image


def visual(row: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(row["image"]).convert("RGB")]


def text(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(row["question"])


def results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    return {"same": float(answers[0].strip() == row["answer"])}
