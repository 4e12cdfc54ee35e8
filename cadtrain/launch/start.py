"""Make the run folder of a plan and run it, again after a failure where that was asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from cadtrain.launch.cluster import supervise_cluster
from cadtrain.launch.environment import environment_record
from cadtrain.launch.evidence import Witness
from cadtrain.launch.folder import LOGS_NAME, hold, prepare_run_dir
from cadtrain.launch.hang import HangLimit
from cadtrain.launch.planning import LaunchPlan, free_port
from cadtrain.launch.reasons import explain
from cadtrain.launch.restart import (
    RestartPolicy,
    argv_to_resume,
    keep_logs,
    launch_time,
    newest_step,
    reason_against,
    record_restart,
    wait_for_restart,
)
from cadtrain.launch.supervise import GracePeriods, LaunchOutcome, supervise
from cadtrain.units import format_seconds


def start(
    plan: LaunchPlan,
    *,
    announce: Callable[[str], None] = lambda text: None,
    grace: GracePeriods = GracePeriods(),
    hang: HangLimit = HangLimit(),
    restarts: RestartPolicy = RestartPolicy(),
    stdout: int | None = None,
) -> LaunchOutcome:
    """Write `config.yaml` and `environment.json`, start the ranks and return how they ended, at last.

    Called from the main thread of a process that is itself no rank. Raises `UsageError` where another launcher holds
    the folder and `EnvironmentFault` where it cannot be written. `stdout` is a file descriptor for the ranks' output.
    """
    from cadtrain.config.load import to_yaml

    record = environment_record(plan.devices, plan.argv, plan.environment)
    if plan.cluster is not None:
        record["hosts"] = [{"name": host.name, "slots": host.slots} for host in plan.cluster.hosts]
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with hold(plan.run_dir):
        prepare_run_dir(plan.run_dir, to_yaml(plan.config), record)
        return _Starts(plan, announce, grace, hang, restarts, stdout).run()


class _Starts:
    """One launch: its first start and those after failures."""

    def __init__(
        self, plan: LaunchPlan, announce: Callable[[str], None], grace: GracePeriods, hang: HangLimit,
        policy: RestartPolicy, stdout: int | None,
    ) -> None:  # fmt: skip
        self.plan, self.announce, self.grace, self.hang = plan, announce, grace, hang
        self.policy, self.stdout = policy, stdout
        self.environment = {**os.environ, **plan.environment, **launch_time()}
        self.seconds = 0.0
        self.in_vain = 0

    def run(self) -> LaunchOutcome:
        number, argv, before = 0, self.plan.argv, newest_step(self.plan.run_dir)
        while True:
            outcome = dataclasses.replace(self._one(argv, is_first=number == 0), num_restarts=number)
            self.seconds += outcome.seconds
            outcome = dataclasses.replace(outcome, seconds=self.seconds)
            if outcome.failure is None or not self.policy.max_restarts:
                return outcome
            after = newest_step(self.plan.run_dir)
            self.in_vain = 0 if after > before else self.in_vain + 1
            if not self._may_restart(outcome, number, has_progressed=after > before):
                return outcome
            number, before = number + 1, after
            if (asked := self._wait(outcome, number, after)) is not None:
                return LaunchOutcome(128 + asked, None, asked, self.seconds, num_restarts=number - 1)
            if self.plan.cluster is None:
                argv = argv_to_resume(self.plan.argv, free_port())

    def _one(self, argv: tuple[str, ...], *, is_first: bool) -> LaunchOutcome:
        plan = self.plan
        witness = Witness(plan.run_dir)
        if plan.cluster is not None:
            cluster = plan.cluster if is_first else dataclasses.replace(plan.cluster, master_port=self.next_port())
            outcome = supervise_cluster(
                cluster, plan.run_dir, launch_time(), resume=plan.resume or not is_first, grace=self.grace, hang=self.hang,
                announce=self.announce,
            )  # fmt: skip
        else:
            outcome = supervise(
                argv, self.environment, plan.run_dir / LOGS_NAME, plan.devices.num_ranks, grace=self.grace,
                hang=self.hang, announce=self.announce, stdout=self.stdout,
            )  # fmt: skip
        if outcome.failure is None:
            return outcome
        return dataclasses.replace(outcome, explanation=explain(outcome.failure, witness.evidence(outcome.pids), plan))

    def next_port(self) -> int:
        """The port of the next start: a free one here, but the one that was asked for where one was."""
        assert self.plan.cluster is not None
        return self.plan.cluster.master_port if self.plan.has_fixed_port else free_port()

    def _may_restart(self, outcome: LaunchOutcome, number: int, *, has_progressed: bool) -> bool:
        assert outcome.explanation is not None
        against = reason_against(outcome.explanation, has_progressed=has_progressed)
        if not against and number >= self.policy.max_restarts:
            against = f"all {self.policy.max_restarts} restarts are used up"
        if against:
            self.announce(f"Not started again: {against}.")
        return not against

    def _wait(self, outcome: LaunchOutcome, number: int, step: int) -> int | None:
        """Say and record what failed, then wait; the signal that ended the wait, if one did."""
        failure, explanation = outcome.failure, outcome.explanation
        assert failure is not None
        assert explanation is not None
        wait = self.policy.wait_seconds(self.in_vain)
        kept = keep_logs(self.plan.run_dir)
        who = f"rank {failure.rank}" if failure.rank >= 0 else "the launch"
        where = f"after step {step}" if step else "from the beginning, as there is no checkpoint yet"
        self.announce(
            f"{who} failed ({explanation.kind}): {first_line(failure.message)}\n"
            f"Restart {number} of {self.policy.max_restarts} in {format_seconds(wait)}, going on {where}; "
            f"what was left: {kept}"
        )
        record_restart(
            self.plan.run_dir, restart=number, of=self.policy.max_restarts, kind=str(explanation.kind), rank=failure.rank,
            type=failure.type, message=failure.message, reason=explanation.reason, from_step=step, wait_seconds=wait,
            logs=str(kept.relative_to(self.plan.run_dir)),
        )  # fmt: skip
        return wait_for_restart(self.plan.run_dir, wait)


def first_line(text: str) -> str:
    """The first line of a message, for one line of talk."""
    return text.split("\n", 1)[0]
