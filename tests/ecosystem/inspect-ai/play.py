"""A task for Inspect: one question, whose answer has to hold a letter."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import pattern
from inspect_ai.solver import generate


@task
def play() -> Task:
    return Task(
        dataset=[Sample(input="Who goes there?", target="e"), Sample(input="What news?", target="e")],
        solver=generate(),
        scorer=pattern(r"([a-z])"),
        config=GenerateConfig(max_tokens=60, seed=7),
    )
