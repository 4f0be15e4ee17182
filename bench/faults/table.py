"""The classes of fault: what goes wrong, what happens then, and the tests that prove it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultClass:
    """One class.

    Attributes:
        name: what goes wrong.
        then: what happens.
        tests: files of tests, or `file::test` where the others of the file are about something else.
        is_input: whether it comes in with what the user gives, and so is refused; else it is survived.
    """

    name: str
    then: str
    tests: tuple[str, ...]
    is_input: bool = False


RESUME, ON, RUN, FAULTS = (f"tests/training/test_{name}.py" for name in ("resume", "going_on", "run", "run_faults"))
ZERO, RANKS = "tests/engine/test_zero.py", "tests/engine/test_zero_runs.py"
FORMATS, HOSTILE = "tests/data/test_formats.py", "tests/model_folder/test_hostile.py"
OWN, PREPARE = "tests/test_files.py", "tests/data/test_prepare.py"
WRITE, CHECK = "tests/model_folder/test_write.py", "tests/data_check/test_data_check.py"

CLASSES = (
    FaultClass(
        "kill -9 at any system call of a save, a rotation, an overwrite; at drawn ones of runs, merges, exports, joins",
        "the old state or the new one is there, whole; the next start clears up and ends as an undisturbed one",
        ("tests/test_kills.py", "tests/test_kills_of_runs.py",
         f"{WRITE}::test_a_kill_half_way_leaves_no_folder_and_the_next_run_clears_up",
         f"{OWN}::test_a_kill_while_a_file_is_replaced_leaves_the_old_one"),
    ),
    FaultClass(
        "a run is killed, wherever, and goes on with 1 or 2 processes",
        "the weights of the undisturbed run: to the bit on one process, within 1e-5 else",
        ("tests/engine/test_kill_points.py", f"{RESUME}::test_killed_and_resumed_equals_uninterrupted",
         f"{RESUME}::test_stopped_and_resumed_equals_uninterrupted_for_other_train_types",
         f"{RANKS}::test_a_run_goes_on_with_any_number_of_processes_and_any_stage"),
    ),
    FaultClass(
        "SIGTERM, SIGUSR1, SIGHUP, ctrl-C; to one process or all, while they start or train",
        "the step is finished and saved; exit 75 (start again) or 130 (by hand); no process is left",
        (f"{RESUME}::test_a_signal_to_the_whole_group_saves_and_says_start_again", "tests/training/test_signals.py",
         "tests/processes/test_workers.py", f"{CHECK}::test_ctrl_c_leaves_no_traceback_and_no_process"),
    ),
    FaultClass(
        "SLURM's time limit, preemption, scancel, a dead node",
        "saved, queued again, ends with the same weights",
        ("tests/slurm/test_run_sh.py", "tests/slurm/test_training.py"),
    ),
    FaultClass(
        "a rank is killed, frozen, or never comes",
        "all ranks end in seconds with one message that names it",
        ("tests/processes/test_lost_rank.py", "tests/processes/test_heartbeat.py"),
    ),
    FaultClass(
        "a loader worker is killed, or hangs (a network drive); a small /dev/shm",
        "exit 1 with a name for it within stuck_timeout_s, what is done is saved; fewer packs are kept ready",
        (f"{FAULTS}::test_a_loader_worker_that_dies_or_hangs_ends_the_run_with_what_is_done_saved",
         "tests/data/test_loader.py"),
    ),
    FaultClass(
        "the disk is full, or its quota used up",
        "looked for before a save; the folder, what is needed and the last checkpoint are named; on_save_error",
        (f"{FAULTS}::test_a_full_disk_is_told_with_the_folder_and_nothing_half_written_is_left",
         f"{FAULTS}::test_too_little_space_is_found_before_a_checkpoint_is_begun",
         f"{RANKS}::test_free_space_is_looked_at_before_a_save_also_where_no_process_holds_a_whole_parameter",
         f"{OWN}::test_a_full_disk_is_told_by_name_and_leaves_the_old_file"),
    ),
    FaultClass(
        "while a checkpoint is being written: a kill, a fault of the run, a fault of the disk, no memory for its copy",
        "the one before is gone on from; it is written first; on_save_error; training waits while it is written",
        ("tests/checkpoint/test_writing.py", "tests/engine/test_zero_saving.py"),
    ),
    FaultClass(
        "memory is used up in a step",
        "what to lower is named; whole weights are saved, half-changed ones are not",
        (f"{FAULTS}::test_out_of_memory_names_what_to_lower_and_saves_whole_weights_only",),
    ),
    FaultClass(
        "a checkpoint is damaged, unreadable just now, or gone",
        "the one before is taken, the damaged one kept aside; unreadable or none left: refused, never begun anew",
        ("tests/checkpoint/test_hostile_checkpoints.py",
         f"{RESUME}::test_a_corrupt_checkpoint_is_passed_over_for_the_one_before",
         f"{ON}::test_with_every_checkpoint_damaged_it_is_refused_at_every_start",
         f"{ON}::test_a_checkpoint_that_cannot_be_read_just_now_stays_what_it_is",
         f"{ON}::test_removed_checkpoints_are_not_begun_again_in_silence"),
    ),
    FaultClass(
        "a finished model, run.json, a list or prepared data is damaged or cut",
        "made anew from what is sound, or named",
        (f"{ON}::test_a_damaged_final_is_written_again_from_the_last_checkpoint",
         f"{ON}::test_a_damaged_description_is_taken_from_a_checkpoint_or_refused",
         f"{ON}::test_half_a_line_in_a_list_is_left_out",
         f"{FAULTS}::test_the_prepared_data_may_be_damaged_or_gone_at_any_time",
         f"{FAULTS}::test_prepared_data_that_goes_while_a_run_needs_it_is_named",
         "tests/data/test_hostile_index.py",
         f"{PREPARE}::test_a_killed_preparation_leaves_nothing_that_is_used"),
    ),
    FaultClass(
        "base model, data or options changed between two starts",
        "refused with what differs; `--allow_changes NAME` takes it over; more steps go on; --base_model",
        ("tests/inference/test_export.py::test_a_base_model_that_moved_is_named_and_one_that_changed_is_noticed",
         f"{ON}::test_a_base_model_that_changed_between_two_starts_is_noticed",
         f"{ON}::test_a_change_that_identifies_the_run_is_taken_over_when_it_is_named",
         f"{ON}::test_a_finished_run_goes_on_to_more_steps_as_if_they_had_been_asked_for_at_once",
         f"{ON}::test_another_version_of_llavaforge_is_told"),
    ),
    FaultClass(
        "loss or gradient is not finite, or 0; a loss far above the last ones",
        "skipped, listed with its records; too many: exit 1, the last checkpoint kept; never an untrained `final`",
        (f"{RUN}::test_steps_without_a_finite_gradient_end_the_run_and_name_their_records",
         f"{RUN}::test_a_run_whose_every_step_was_skipped_leaves_no_finished_model",
         f"{FAULTS}::test_a_loss_far_above_the_last_ones_is_told_with_its_records",
         f"{ZERO}::test_a_gradient_that_is_no_number_on_one_rank_skips_the_step_on_all"),
    ),
    FaultClass(
        "a batch without an image on one rank",
        "no rank waits for another",
        (f"{RANKS}::test_a_rank_that_has_only_text_keeps_up",),
    ),
    FaultClass(
        "a file or folder of the user's is where something is to be written",
        "refused before any work; only what llavaforge wrote is replaced",
        (f"{OWN}::test_another_file_of_that_name_is_refused_before_any_work_and_ours_replaced", "tests/test_folders.py",
         f"{ON}::test_a_final_that_is_the_users_is_refused_before_a_step_is_taken",
         f"{ON}::test_what_the_user_put_into_final_is_kept_when_it_is_replaced",
         f"{ON}::test_a_folder_that_holds_only_dotfiles_is_the_users_and_stays_as_it_was",
         f"{ON}::test_old_checkpoints_with_something_of_the_users_are_kept"),
        is_input=True,
    ),
    FaultClass(
        "recipes and numbers: keys twice, alias bombs, encodings, 1e400, names that lead elsewhere",
        "exit 2, a sentence",
        ("tests/config/test_load.py",),
        is_input=True,
    ),
    FaultClass(
        "small files of a model: cut, flipped, ill-typed, too deep; pickles with code; endless templates",
        "opened as they are or exit 2 with the file's name; no code runs",
        (HOSTILE, "tests/model_folder/test_tensors.py", "tests/join/test_other_language_models.py",
         "tests/join/test_customize_refusals.py"),
        is_input=True,
    ),
    FaultClass(
        "rows: malformed, without bound, with videos, images in unread fields",
        "named with file and row; left out under on_bad_sample: skip",
        (FORMATS, "tests/data/test_records.py", "tests/data/test_readers.py", "tests/training/test_bad_samples.py"),
        is_input=True,
    ),
    FaultClass(
        "images: cut, no images, bombs, out of their folder, 16 bits, CMYK, animated, turned",
        "decoded as people see them, or named",
        ("tests/data/test_images.py", "tests/data/test_image_store.py"),
        is_input=True,
    ),
    FaultClass(
        "folders that cannot be written, control characters in texts",
        "exit 2 with the folder; shown as signs",
        (f"{OWN}::test_of_a_bad_place_the_user_is_told_and_no_other_error_is_called_theirs",
         f"{OWN}::test_control_characters_of_other_peoples_texts_do_not_reach_the_terminal"),
        is_input=True,
    ),
)  # fmt: skip

NOT_APPLICABLE = {
    "remote images, SSRF, servers without a key, Gradio": "nothing is fetched; `demo` serves at 127.0.0.1 alone unless "
    "told otherwise, gives no file away and bounds uploads (`make test-demo`)",
    "a GPU's own faults (NCCL, device memory)": "none came on the one H200 that was tried, by `make bench-gpu`",
    "flipped bits in the middle of a JPEG": "the format has no checksum; a zip's CRC-32 is checked",
}
