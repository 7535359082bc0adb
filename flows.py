"""The Prefect flow: one task a stage, each waiting for the stages it reads.

The store is the truth about what is made; Prefect remembers the same keys, shows the runs and keeps their history.
As a program this file hands over to pipeline/commands/cli.py.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

from pipeline.commands.cli import main


def build_flow() -> Any:
    """The flow `chatmill(overrides)`. Prefect is imported here and in pipeline/runner/server.py, and nowhere else."""
    from prefect import Task, flow, task
    from prefect.artifacts import (
        create_markdown_artifact,
        create_progress_artifact,
        create_table_artifact,
        update_progress_artifact,
    )
    from prefect.task_runners import ThreadPoolTaskRunner

    from pipeline.plan.plan import Step
    from pipeline.runner.run import Run

    def stage_task(run: Run, step: Step) -> Task[Any, dict[str, str]]:
        """The Prefect task of one stage; its cache key is the stage's key, its record lies in the artifact's folder."""

        @task(
            name=step.name,
            task_run_name=step.name,
            cache_key_fn=lambda context, parameters: run.record_path(step),
            persist_result=True,
            result_storage=run.session.store.artifacts,
            result_serializer="json",
            refresh_cache=step.action == "run",
        )
        def make_stage(upstream: list[dict[str, str]]) -> dict[str, str]:  # Prefect draws its edges from them
            return run.make(step, show_progress(step))

        return make_stage

    def show_progress(step: Step) -> Callable[[float], None]:
        """A bar in Prefect's own pages, moved in the thread of the stage's task."""
        shown: list[Any] = []

        def show(percent: float) -> None:
            if shown:
                update_progress_artifact(shown[0], percent)
            else:
                key = re.sub(r"[^a-z0-9]+", "-", step.name)
                shown.append(create_progress_artifact(percent, key=key, description=step.name))

        return show

    @flow(name="chatmill", task_runner=ThreadPoolTaskRunner(max_workers=32))  # type: ignore[arg-type]
    def chatmill(overrides: list[str]) -> dict[str, str]:
        """Make what the overrides ask for. Returns the key of each stage."""
        with Run.open(overrides) as run:
            create_table_artifact(run.plan_rows(), key="plan", description="What runs, and why")
            futures: dict[str, Any] = {}
            for step in run.plan.steps.values():
                if step.action == "idle":
                    continue
                # A cached stage waits for nothing: what it was made of may be gone.
                sources = step.stage.inputs.values() if step.action == "run" else ()
                futures[step.name] = stage_task(run, step).submit([futures[source] for source in sources])
            for future in futures.values():
                future.wait()
            run.raise_failures()
            if report := run.report():
                create_markdown_artifact(report, key="report", description="The report of this run")
            return {name: future.result()["key"] for name, future in futures.items()}

    return chatmill


if __name__ == "__main__":
    sys.exit(main())
