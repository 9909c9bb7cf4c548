"""The kind of device that a sweep's workers will be on, which some choices of a space depend on."""

from __future__ import annotations

import os


def device_kinds(address: str | None) -> set[str]:
    """As torch calls them: cpu, cuda, ... Without a cluster's address, this machine's; else of a node of it that has
    accelerators, which is asked and needs none of them free. Raises UsageError for a cluster that cannot be joined."""
    if address is None and not os.environ.get("RAY_ADDRESS"):
        from streamllm.engine.device import default_device

        return {default_device().type}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .cluster import Cluster

    cluster = Cluster.join(address)
    try:
        able = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
        if not able:
            return {"cpu"}
        there = NodeAffinitySchedulingStrategy(able[0], soft=False)
        return {ray.get(ray.remote(built_for).options(num_cpus=0, scheduling_strategy=there).remote())}
    finally:
        cluster.leave()


def built_for() -> str:
    """The kind of device that torch here was built for, be there one to be seen or not."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else "cpu"
