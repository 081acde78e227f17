"""Jobs through Ray: on a cluster that is there, or on one of this machine that ends with the sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import OmegaConf, open_dict

from harness import wording
from harness.environment import available_cpus
from harness.errors import HarnessError

#: What the plugin would ask for: Ray's own choice is a share of the memory that trials are measured in.
_OBJECT_STORE_BYTES = 78_643_200


class RayError(HarnessError):
    """Ray cannot run the jobs."""


def launch(launcher: Any, overrides: Sequence[Sequence[str]], *, threads: int) -> list[JobReturn]:
    """Run one job for each list of overrides.

    Args:
        threads: CPUs that a job asks for, unless `+hydra.launcher.ray.remote.num_cpus` says otherwise.

    Raises:
        RayError: no job can ever start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    settings: dict[str, Any] = dict(OmegaConf.to_container(launcher.ray_cfg.init, resolve=True))  # type: ignore[arg-type]
    settings = {"log_to_driver": False, "logging_level": logging.ERROR, **settings}
    local = is_local(settings.get("address"))
    if local:
        settings = {
            "include_dashboard": False,
            "num_cpus": available_cpus(),
            "object_store_memory": _OBJECT_STORE_BYTES,
            **settings,
        }
    with open_dict(launcher.ray_cfg.remote):
        launcher.ray_cfg.remote.setdefault("num_cpus", min(threads, available_cpus()) if local else threads)
    # Here and not by the plugin, which asks for an object store even where the cluster has one.
    ray.init(**settings)
    try:
        _require_room(launcher.ray_cfg.remote, ray.cluster_resources(), local=local)
        return list(launcher.launch(overrides, initial_job_idx=0))
    finally:
        ray.shutdown()


def is_local(address: object) -> bool:
    """Whether Ray is started here instead of being found."""
    return address == "local" or not (address or os.environ.get("RAY_ADDRESS"))


def _require_room(remote: Any, resources: dict[str, float], *, local: bool) -> None:
    """Ray would wait for ever; a cluster may grow, this machine does not.

    Raises:
        RayError: a job asks for more than there is on this machine.
    """
    for key, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        wanted, there = float(remote.get(key) or 0), resources.get(resource, 0.0)
        if wanted > there:
            message = f"hydra.launcher.ray.remote.{key}={wanted:g}: Ray has {there:g} here"
            if local:
                raise RayError(message)
            wording.complain(f"{message}; the jobs wait until it has")
