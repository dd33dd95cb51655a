"""One module an experiment: what a training takes, as something is varied, with a figure that the README shows.

Each has a docstring that is its title, REPETITIONS unless others are asked for, and

    run(stage) -> list[Result]
    summarize(run) -> Iterator[str]        what follows from the results, as lines of Markdown
    draw(figure, run)                      the picture, from the results alone
"""

from __future__ import annotations

EXPERIMENTS = ("local_and_remote", "capacity_sweep", "tiers", "epochs", "workers")
"""In the order in which they are run."""
