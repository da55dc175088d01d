"""Chooses the hyperparameters that suit the size of a text, where the user does not give them.

docs/training.md says what is chosen for which size, and what of it was measured. Nothing here reads a text or imports
torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from service.training.hyperparameters import CHOSEN, Hyperparameters, windows_per_epoch

# A column for each number of training characters. Between two columns a setting is interpolated over the logarithm of
# the number; beyond the first and the last it stays as it is there.
_SIZES = (9_000, 27_000, 135_000, 900_000, 9_000_000, 90_000_000, 900_000_000)
_MOST_EPOCHS = 30
# A small batch gives a small text enough updates, and a run that reads little of a text: what it reads in 30 epochs
# counts as the size of the text.
_BATCH_SIZE = (8, 16, 32, 64, 64, 64, 64)
_SEQUENCE_LENGTH = (64, 64, 100, 100, 100, 100, 100)
# More text needs fewer passes, and less against learning it by heart. Time grows as the root of the size beyond a
# million characters.
_EPOCHS = (_MOST_EPOCHS, 30, 30, 30, 10, 3, 1)
_WEIGHT_DECAY = (1.0, 1.0, 1.0, 1.0, 0.3, 0.1, 0.1)
_INPUT_DROPOUT = (0.25, 0.25, 0.1, 0.1, 0.05, 0.0, 0.0)
_RECURRENT_DROPOUT = (0.5, 0.5, 0.4, 0.4, 0.2, 0.1, 0.0)
_OUTPUT_DROPOUT = (0.5, 0.5, 0.4, 0.4, 0.2, 0.1, 0.0)

_FEW_CHARS, _FEW_UNITS, _UNITS = 100_000, 512, 1024  # with fewer training characters, more units only memorise
_RESTART_INTERVAL = 500  # characters
_MAX_WARMUP = 100  # updates; at most a tenth of all
_EVALUATIONS, _MAX_EVALUATIONS = 40, 200  # of a whole run: the aim, and the limit
_MIN_INTERVAL, _MAX_INTERVAL = 10, 1000  # updates between two evaluations, unless the limit needs more
_EVALUATION_SHARE = 0.2  # of the time of training that all evaluations but the last take at most
_EVALUATION_SPEED = 3  # times as fast as training an evaluation reads
_PATIENCE = 0.3  # of the evaluations of a whole run

MIN_CHARS = 5_000  # training characters below which a model can learn little
MIN_UPDATES = 150  # updates below which the best loss was never reached
_CHARS_PER_S = 10_000  # of training with 1,024 units, on two idle cores
_LONG_RUN_H = 2.0  # the expected hours from which they are said


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, and what the user is told about them."""

    settings: Hyperparameters  # all of them are given: none is left to choose
    lines: tuple[str, ...]  # what was chosen, if anything was; then warnings


def choose(given: Hyperparameters, num_chars: int, num_texts: int = 1, num_held_out: int = 0) -> Recipe:
    """Choose the settings that suit a training text.

    A setting that was given, which `given.model_fields_set` says, never changes. What is chosen fits it: the warm-up
    fits the number of updates that a given batch size leads to.

    Args:
        given: the settings; those that were not given have their defaults.
        num_chars: characters of the training text, without the held-out part.
        num_texts: texts that it consists of, each of them read from the zero state.
        num_held_out: characters that each evaluation reads.
    """
    epochs = round(_at(num_chars, _EPOCHS))
    num_read = num_chars * _with(given, {"epochs": epochs}).epochs
    if given.max_chars:
        num_read = min(num_read, given.max_chars)
    size = min(num_chars, num_read // _MOST_EPOCHS)
    chosen = {
        "num_units": _UNITS if num_chars >= _FEW_CHARS else _FEW_UNITS,
        "batch_size": 8 * round(_at(size, _BATCH_SIZE) / 8),
        "sequence_length": round(_at(size, _SEQUENCE_LENGTH)),
        "epochs": epochs,
        "weight_decay": round(_at(num_chars, _WEIGHT_DECAY), 2),
        "input_dropout": round(_at(num_chars, _INPUT_DROPOUT), 2),
        "recurrent_dropout": round(_at(num_chars, _RECURRENT_DROPOUT), 2),
        "output_dropout": round(_at(num_chars, _OUTPUT_DROPOUT), 2),
        # Lines are read from their beginning only. Short texts begin often enough by themselves.
        "restart_interval": 0 if given.lines or num_chars < num_texts * 2 * _RESTART_INTERVAL else _RESTART_INTERVAL,
    }
    if 0 < given.max_chars <= num_chars:  # read at most once, a text can't be learnt by heart
        chosen |= {"input_dropout": 0.0, "recurrent_dropout": 0.0, "output_dropout": 0.0}
    settings = _with(given, chosen)
    per_epoch = windows_per_epoch(num_chars, settings.batch_size, settings.sequence_length)
    num_updates = settings.num_updates(num_chars)
    interval = min(max(num_updates // _EVALUATIONS, _MIN_INTERVAL), _MAX_INTERVAL)
    in_an_update = settings.batch_size * settings.sequence_length  # characters
    affordable = math.ceil(num_held_out / (_EVALUATION_SPEED * _EVALUATION_SHARE * in_an_update))
    interval = min(max(interval, affordable, -(-num_updates // _MAX_EVALUATIONS)), num_updates)
    interval = _with(given, {"eval_interval": interval}).eval_interval or per_epoch
    chosen |= {
        "warmup_steps": min(_MAX_WARMUP, num_updates // 10),
        "eval_interval": interval,
        "patience": math.ceil(_PATIENCE * num_updates / interval),
    }
    settings = _with(given, chosen)
    lines = [line] if (line := _said(given, settings, num_chars, num_updates)) else []
    return Recipe(settings, (*lines, *_warnings(settings, num_chars, num_updates)))


def limit_time(
    given: Hyperparameters, seconds: float, pace: float, num_chars: int, num_texts: int, num_held_out: int
) -> Hyperparameters:
    """Return the given settings with a limit of characters that training reaches within a time, evaluations included.

    See `choose`. `pace` is the number of characters a second that are read in training without evaluations.
    """
    num_read = seconds * pace
    settings = choose(_read_at_most(given, num_read), num_chars, num_texts, num_held_out).settings
    interval = settings.eval_interval or windows_per_epoch(num_chars, settings.batch_size, settings.sequence_length)
    share = num_held_out / (_EVALUATION_SPEED * interval * settings.batch_size * settings.sequence_length)
    return _read_at_most(given, num_read / (1 + share))


def _read_at_most(given: Hyperparameters, num_chars: float) -> Hyperparameters:
    return given.model_copy(update={"max_chars": max(1, int(num_chars))})


def _at(num_chars: int, values: tuple[float, ...]) -> float:
    return float(np.interp(math.log(max(1, num_chars)), np.log(_SIZES), values))


def _with(given: Hyperparameters, chosen: dict[str, float]) -> Hyperparameters:
    """Return the given settings with the chosen ones in place of those that were not given."""
    return given.model_copy(update={key: value for key, value in chosen.items() if key not in given.model_fields_set})


def _said(given: Hyperparameters, settings: Hyperparameters, num_chars: int, num_updates: int) -> str:
    options = [
        f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in CHOSEN if name not in given.model_fields_set
    ]
    if not options:
        return ""
    return f"chosen for {num_chars:,} characters to train on, {num_updates:,} updates: {' '.join(options)}"


def limiting_option(settings: Hyperparameters, num_chars: int) -> str:
    """Return the option that limits the number of updates of a run on this number of training characters."""
    unlimited = settings.model_copy(update={"max_chars": 0})
    return "--epochs" if unlimited.num_updates(num_chars) == settings.num_updates(num_chars) else "--max-chars"


def _warnings(settings: Hyperparameters, num_chars: int, num_updates: int) -> list[str]:
    lines = []
    if num_chars < MIN_CHARS:
        lines.append(
            f"warning: {num_chars:,} characters to train on are too few for a good model, which takes "
            f"{MIN_CHARS:,} or more: add text"
        )
    if num_updates < MIN_UPDATES:
        lines.append(
            f"warning: {num_updates:,} updates are few, and a good model takes {MIN_UPDATES} or more: raise "
            f"{limiting_option(settings, num_chars)}, or lower --batch-size or --sequence-length"
        )
    if settings.warmup_steps > num_updates / 2:
        lines.append(
            f"warning: the learning rate rises for {settings.warmup_steps:,} of {num_updates:,} updates, so the model "
            f"learns little: lower --warmup-steps, or raise {limiting_option(settings, num_chars)}"
        )
    num_read = num_updates * settings.batch_size * settings.sequence_length
    hours = num_read / _CHARS_PER_S / 3600 * settings.num_layers * (settings.num_units / _UNITS) ** 2
    if hours >= _LONG_RUN_H:
        lines.append(
            f"the run reads {num_read:,} characters, which takes two idle cores about {hours:,.0f} hours; --minutes or "
            "--epochs shortens it, and Ctrl-C publishes the best model so far"
        )
    return lines
