"""What a launch will do, decided before anything is made or started."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadtrain.checkpoint.layout import CHECKPOINTS, STATE, checkpoint_name, list_steps
from cadtrain.errors import UsageError
from cadtrain.host_memory import available_memory
from cadtrain.launch.cluster import Cluster
from cadtrain.launch.devices import GpuRequest, RankDevices, choose_devices, find_gpus
from cadtrain.launch.environment import environment_changes
from cadtrain.launch.folder import CONFIG_NAME, ENVIRONMENT_NAME, LOGS_NAME, check_run_dir, default_run_dir
from cadtrain.launch.hosts import PLAIN_SSH, Host, RemoteShell, passed_on
from cadtrain.plan.stage import StageChoice, choose_stage

if TYPE_CHECKING:
    from cadtrain.config.sections import RunConfig

DEFAULT_CONFIG = "demo"
WORKER: tuple[str, ...] = ("cadtrain", "train")
"""The module that every rank runs, and its first arguments."""


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What was asked for on the command line; None where nothing was."""

    config: str | None = None
    gpus: GpuRequest = None
    zero: str | None = None
    offload: bool = False
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    resume: bool = False
    hosts: tuple[Host, ...] = ()
    """Hosts to run on; none for this one alone."""
    shell: RemoteShell = PLAIN_SSH
    port: int | None = None
    """The port over which the ranks of several hosts meet; None takes a free one."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything that `start` needs. `environment` holds only what changes for the ranks."""

    config: RunConfig
    source: str
    devices: RankDevices
    zero: StageChoice
    run_dir: Path
    resume: bool
    argv: tuple[str, ...]
    """DeepSpeed's launcher on this host; empty where `cluster` starts one on each of several."""
    environment: dict[str, str]
    cluster: Cluster | None = None
    has_fixed_port: bool = False

    def host_commands(self) -> list[tuple[Host, list[str]]]:
        """What is executed here for each host of a run over several."""
        if self.cluster is None:
            return []
        orders = self.cluster.orders(self.run_dir, "TOKEN", resume=self.resume)
        return [(self.cluster.hosts[order.node_rank], self.cluster.argv(order, passed_on())) for order in orders]

    def as_json(self) -> dict[str, Any]:
        """The plan for a script: argv, environment changes and what was decided."""
        return {
            "run_dir": str(self.run_dir),
            "source": self.source,
            "resume": self.resume,
            "device": self.devices.kind,
            "num_ranks": self.devices.num_ranks,
            "gpus": [gpu.id for gpu in self.devices.gpus],
            "zero_stage": self.zero.stage,
            "zero_reason": self.zero.reason,
            "recompute": self.config.model.recompute,
            "predicted_peak_bytes": self.zero.peak_bytes,
            "argv": list(self.argv),
            "environment": self.environment,
            "hosts": [
                {"name": host.name, "slots": host.slots, "argv": command} for host, command in self.host_commands()
            ],
        }


def plan_launch(
    request: LaunchRequest, *, environ: Mapping[str, str] = os.environ, worker: Sequence[str] = WORKER
) -> LaunchPlan:
    """Read the configuration, choose devices and ZeRO stage, and compose the launcher's command; only reads.

    Raises `ConfigError` for faults of the configuration, `DataError` for a folder that is no dataset, `UsageError` for a run folder that cannot be used and
    `EnvironmentFault` where there are fewer GPUs than asked for.
    """
    if request.resume and request.run_dir is None:
        raise UsageError("--resume needs the run folder to go on with.", hint="Add --run-dir runs/<name>.")
    if request.run_dir is not None:
        check_run_dir(request.run_dir, resume=request.resume)
    source = _source(request)
    config = _load(source, request)
    _check_data(config)
    if config.checkpoint.init_from is not None and not request.resume:
        from cadtrain.checkpoint.source import find_checkpoint  # loads torch, which other launches do without

        find_checkpoint(config.checkpoint.init_from)
    if request.resume and request.run_dir is not None:
        _check_codec(config, request.run_dir)
    devices = _devices(request, environ)
    _check_curriculum(config, devices.num_ranks)
    memory = min((gpu.memory_total for gpu in devices.gpus), default=None)
    name = devices.gpus[0].name if devices.gpus else ""
    choice = choose_stage(
        config, devices.num_ranks, memory, host_weights=request.offload, device=name,
        host_bytes=0 if request.hosts or not devices.gpus else available_memory(),
    )  # fmt: skip
    config = with_choice(config, choice, offload_parameters=request.offload and choice.stage == 3)
    run_dir = request.run_dir if request.run_dir is not None else default_run_dir(config.name)
    check_run_dir(run_dir, resume=request.resume)
    cluster = _cluster(request, devices, tuple(worker))
    argv = () if cluster else launcher_argv(devices, run_dir, port=free_port(), resume=request.resume, worker=worker)
    return LaunchPlan(
        config=config,
        source=source,
        devices=devices,
        zero=choice,
        run_dir=run_dir,
        resume=request.resume,
        argv=tuple(argv),
        environment=environment_changes(devices, environ, logs=run_dir / LOGS_NAME),
        cluster=cluster,
        has_fixed_port=request.port is not None,
    )


def _devices(request: LaunchRequest, environ: Mapping[str, str]) -> RankDevices:
    gpus = find_gpus(environ)
    if request.hosts:
        # The other hosts are taken to have GPUs like this one's; each looks for itself before it starts ranks.
        return RankDevices("cuda" if gpus else "cpu", sum(host.slots for host in request.hosts), gpus)
    return choose_devices(gpus, request.gpus or _ranks_before(request))


def _cluster(request: LaunchRequest, devices: RankDevices, worker: tuple[str, ...]) -> Cluster | None:
    if not request.hosts:
        return None
    port = request.port if request.port is not None else free_port()
    return Cluster(request.hosts, request.shell, devices.kind, request.hosts[0].name, port, worker)


def _check_data(config: RunConfig) -> None:
    """Refuse a folder that is no dataset, or holds no features of it, before anything is made or started; raises `DataError`."""
    path, features = config.data.path, config.data.features
    if path is not None:
        from cadtrain.data.manifest import Manifest

        Manifest.read(path)
    if features is not None:
        from cadtrain.data.features.agreement import refuse_others
        from cadtrain.data.features.manifest import FeatureManifest

        manifest = FeatureManifest.read(features)
        if path is not None:  # procedural parts are made when the run starts
            refuse_others(config, manifest, features, path)


def _check_curriculum(config: RunConfig, num_ranks: int) -> None:
    """Refuse stages and batches that the ranks would refuse, before anything is made or started; raises `ConfigError`."""
    from cadtrain.config.batch_plan import refuse_hopeless
    from cadtrain.plan.predict import count_samples

    refuse_hopeless(config, world_size=num_ranks, num_samples=count_samples(config))


def _check_codec(config: RunConfig, run_dir: Path) -> None:
    """Refuse to go on with a model that learnt to write another codec, before the run's configuration is replaced.

    What cannot be read here is left to the ranks, which check it again.
    """
    root = run_dir / CHECKPOINTS
    steps = list_steps(root)
    try:
        found = json.loads((root / checkpoint_name(steps[-1]) / STATE).read_text(encoding="utf-8"))["codec"].split()[0]
    except (IndexError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if found != config.data.codec:
        raise UsageError(
            f"is {config.data.codec}, but the model of {run_dir} learnt to write {found}.",
            where="data.codec",
            hint=f"Leave it at {found}, or start a new run.",
        )


def _ranks_before(request: LaunchRequest) -> int | None:
    """Ranks that the run to be resumed had: a resumed run takes the same number unless told otherwise."""
    if not request.resume or request.run_dir is None:
        return None
    try:
        record = json.loads((request.run_dir / ENVIRONMENT_NAME).read_text(encoding="utf-8"))
        return int(record["num_ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _source(request: LaunchRequest) -> str:
    if request.config is not None:
        return request.config
    if request.resume and request.run_dir is not None:
        return str(request.run_dir / CONFIG_NAME)
    return DEFAULT_CONFIG


def _load(source: str, request: LaunchRequest) -> RunConfig:
    from cadtrain.config.load import load_run_config

    overrides = list(request.overrides)
    if request.zero is not None:
        overrides.append(f"zero.stage={request.zero}")
    if request.offload:
        overrides.append("zero.offload_optimizer=true")
    config: RunConfig = load_run_config(source, overrides).config
    return config


def with_choice(config: RunConfig, choice: StageChoice, *, offload_parameters: bool) -> RunConfig:
    """`config` with the decided ZeRO stage and recomputation, so that every rank reads numbers and decides nothing itself."""
    update: dict[str, Any] = {"stage": choice.stage}
    if choice.offload_optimizer:
        update |= {"offload_optimizer": True, "offload_parameters": choice.offload_parameters}
    if offload_parameters:
        update["offload_parameters"] = True
    model = config.model
    if model.recompute == "auto":
        model = model.model_copy(update={"recompute": choice.recompute_setting})
    return config.model_copy(update={"zero": config.zero.model_copy(update=update), "model": model})


def free_port() -> int:
    """A TCP port of this host that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launcher_argv(
    devices: RankDevices, run_dir: Path, *, port: int, resume: bool, worker: Sequence[str] = WORKER
) -> list[str]:
    """The command that starts the ranks: DeepSpeed's per-node launcher.

    Its front end (`deepspeed`, `deepspeed.launcher.runner`) would start this same command, but overwrites
    CUDA_VISIBLE_DEVICES, crashes on UUIDs in it, and exits with 0 when the launcher was killed by a signal.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices.ids}).encode()).decode()
    argv = [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}",
        "--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank", "--log_level=critical", "--module",
        *worker, "--run-dir", str(run_dir),
    ]  # fmt: skip
    return [*argv, "--resume"] if resume else argv
