"""Make the run folder of a plan and run it."""

from __future__ import annotations

import os
from collections.abc import Callable

from cadtrain.launch.environment import environment_record
from cadtrain.launch.folder import LOGS_NAME, hold, prepare_run_dir
from cadtrain.launch.planning import LaunchPlan
from cadtrain.launch.supervise import GracePeriods, LaunchOutcome, supervise


def start(
    plan: LaunchPlan,
    *,
    announce: Callable[[str], None] = lambda text: None,
    grace: GracePeriods = GracePeriods(),
    stdout: int | None = None,
) -> LaunchOutcome:
    """Write `config.yaml` and `environment.json`, start the ranks and return how they ended.

    Called from the main thread of a process that is itself no rank. Raises `UsageError` where another launcher holds
    the folder and `EnvironmentFault` where it cannot be written. `stdout` is a file descriptor for the ranks' output.
    """
    from cadtrain.config.load import to_yaml

    record = environment_record(plan.devices, plan.argv, plan.environment)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with hold(plan.run_dir):
        prepare_run_dir(plan.run_dir, to_yaml(plan.config), record)
        environment = {**os.environ, **plan.environment}
        logs = plan.run_dir / LOGS_NAME
        return supervise(
            plan.argv, environment, logs, plan.devices.num_ranks, grace=grace, announce=announce, stdout=stdout
        )
