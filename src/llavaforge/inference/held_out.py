"""What the run of a model held out: found again as its `run.json` says, and only if these are the same records.

Comes in: a folder that a run left. Goes out: its options for data, and the rows of an index.
"""

from pathlib import Path

from llavaforge.checkpoint.state import load_run
from llavaforge.checkpoint.trained import own_run
from llavaforge.config.schema import DataOptions, EvaluateConfig, TrainConfig
from llavaforge.data.order.run_data import HeldOut, open_data, open_held_out
from llavaforge.errors import UserError, reading
from llavaforge.model.load import LoadedModel
from llavaforge.model_folder.card import RUN

# What of a run's options says which records it held out, and how they are read.
_OF_DATA = DataOptions.model_fields.keys() | {"model_name_or_path", "output_dir", "on_bad_sample", "max_bad_samples"}
_ELSE = "Or leave held_out out, and give --data_path with data that the model has not seen."
_WHERE = (
    "A run's data is looked for as its recipe named it, from the folder in which you are now; of absolute paths a "
    "model that was exported or moved knows the last part alone."
)


def run_of(config: EvaluateConfig) -> tuple[TrainConfig, str]:
    """Return how a model's run read its data, and what identifies the records that it held out.

    Raises:
        UserError: the model is no run's, or what its run held out cannot be told.
    """
    folder = Path(config.model_name_or_path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a run's `final` or `checkpoint-N`.")
    if not (folder / RUN).is_file():
        raise UserError(f"{folder}: no run's folder (no {RUN}), so nothing says what was held out. {_ELSE}")
    run = own_run(folder, load_run(folder))
    with reading(folder / RUN, f"Restore it. {_ELSE}"):
        values = run["config"]
        train = TrainConfig.model_validate({name: values[name] for name in _OF_DATA & values.keys()})
    if not train.eval_entries and not train.validation_split:
        raise UserError(f"{folder}: its run held nothing out. {_ELSE}")
    if (records := run.get("held_out")) is None:
        raise UserError(f"{folder}: its llavaforge was older and did not note what is held out. {_ELSE}")
    if train.validation_split and run.get("earlier_held_out"):
        raise UserError(
            f"{folder}: its data was changed as it went on (allow_changes), or an older llavaforge began it: it may "
            f"have trained on some of the records held out now. {_ELSE}"
        )
    return train if config.cache_dir is None else train.model_copy(update={"cache_dir": config.cache_dir}), records


def open_what_run_held_out(train: TrainConfig, records: str, loaded: LoadedModel, most: int | None) -> HeldOut:
    """Open what a run held out, or the first of it.

    Raises:
        UserError: it is at fault, or other than it was.
    """
    ids = loaded.processor, loaded.num_image_tokens
    try:
        if train.eval_entries:
            held_out: HeldOut | None = open_held_out(train, *ids, quiet=False)[0]
        else:
            held_out = open_data(train, *ids, quiet=False).held_out
    except UserError as error:
        raise UserError(f"held_out: {error} {_WHERE} {_ELSE}") from None
    if held_out is None or held_out.records != records:
        names = ", ".join(str(entry.path) for entry in train.eval_entries or train.entries)
        quarantine = f", or {train.quarantine}" if train.quarantine is not None else ""
        raise UserError(
            f"{names}{quarantine} has been edited or written anew since the run, so it cannot be told whether the "
            f"records are those that were held out. Restore it. {_ELSE}"
        )
    return HeldOut(held_out.index, held_out.rows[:most])
