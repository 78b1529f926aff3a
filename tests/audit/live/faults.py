"""The fault matrix as data: every fault that is injected, and what an audit must say of it."""

from __future__ import annotations

import faults_decoys
import faults_forward
import faults_optimizer
import faults_state
from fault_scene import Fault

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for part in (faults_forward, faults_optimizer, faults_state, faults_decoys)
    for fault in part.FAULTS
}
