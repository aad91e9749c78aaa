"""Adapters on engines: what must be resident, and loading, probing, admitting, unloading it.

A version's adapter gets traffic on a replica only after it answered a real request there under its
own served name. Losing one is the other way round: first gateways stop sending, then it is unloaded.
"""

from rollout.serving.api import Listing, ReplicaApi, Waits
from rollout.serving.plan import (
    ResidencyPlan,
    idle_adapters,
    is_ours,
    required_versions,
    residency_plan,
)
from rollout.serving.replica import Pass, Replica
from rollout.serving.waiting import wait_resident

__all__ = [
    "Listing",
    "Pass",
    "Replica",
    "ReplicaApi",
    "ResidencyPlan",
    "Waits",
    "idle_adapters",
    "is_ours",
    "required_versions",
    "residency_plan",
    "wait_resident",
]
