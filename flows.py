"""The Prefect flow: one task per stage, each waiting for the stages it reads.

    from flows import chatmill          # chatmill(recipe="tiny"), chatmill.serve(), `prefect deploy flows.py:chatmill`

The store is the truth about what is made. Prefect remembers the same keys, shows the runs and keeps their history.
As a program this file hands over to pipeline/commands/cli.py, whose commands import Prefect only where something runs.
"""

if __name__ == "__main__":
    from pipeline.commands.cli import program

    program()

from typing import Any

from pipeline.runner import server

server.set_defaults()  # before Prefect reads them

from prefect import Task, flow, task
from prefect.futures import wait
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.transactions import get_transaction

from pipeline.plan.plan import Step
from pipeline.runner.prefect_pages import Pages, state_of
from pipeline.runner.run import Run, begun


@flow(name="chatmill", task_runner=ThreadPoolTaskRunner(max_workers=32))  # type: ignore[arg-type]
def chatmill(
    recipe: str = "tiny",
    overrides: list[str] = [],  # noqa: B006 (Prefect shows it as an empty list)
    until: str = "",
    run_name: str = "",
) -> Any:
    """Train what a recipe and settings ask for. Stages that the store already holds are not made again.

    Returns the key of each stage.

    Args:
        recipe: What to train: tiny, d12, d20, d26, d32, or a recipe of your own. For example d20.
        overrides: Settings as on the command line, one per entry. For example sft.params.lr_frac=0.05.
        until: The last stage to make, or empty to make all. For example pretrain.
        run_name: A name for this run and for the models that it makes, or empty. For example first.
    """
    parameters = {"recipe": recipe, "overrides": overrides, "until": until, "run_name": run_name}
    try:
        with begun(parameters) as run, Pages(run) as pages:
            futures: dict[str, Any] = {}
            for step in run.plan.steps.values():
                if step.action != "idle":
                    # A cached stage waits for nothing: what it was made of may be gone.
                    sources = step.stage.inputs.values() if step.action == "run" else ()
                    futures[step.name] = stage_task(run, step, pages).submit([futures[source] for source in sources])
            wait(list(futures.values()))
            run.make_rest()  # nothing, unless Prefect failed to run a task
            run.raise_failures()
            return run.keys()
    except Exception as error:
        return state_of(error)


def stage_task(run: Run, step: Step, pages: Pages) -> Task[Any, Any]:
    """The Prefect task of one stage. Its cache key is the stage's key, and its record is in the artifact's folder."""

    @task(
        name=step.name,
        task_run_name=step.name,
        cache_key_fn=lambda context, parameters: run.record_path(step),
        persist_result=True,
        result_storage=run.session.store.artifacts,
        result_serializer="json",
        refresh_cache=step.action == "run",
    )
    def make_stage(upstream: list[dict[str, str]]) -> dict[str, str] | State[Any]:  # Prefect draws its edges from them
        try:
            record = run.make(step, pages.of(step))
        except Exception as error:
            if transaction := get_transaction():
                transaction.write_on_commit = False  # no record of a stage that was not made
            return state_of(error)
        # Without a record of Prefect's own, as after kill -9, it would not know that the stage was cached.
        return Completed(name="Cached", data=record) if step.action == "cached" else record

    return make_stage
