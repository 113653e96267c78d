"""Test doubles and simulated disks, for the tests of applications and of Pillarbox itself.

doubles.py            a clock that tests advance, and a sink that records batches
crash.py              a disk in memory, and processes that use it
durability_model.py   what may remain of such a disk after a loss of power
fault.py              a file system that fails at chosen operations
"""

from pillarbox.testing.crash import CrashFilesystem, Disk
from pillarbox.testing.doubles import ManualClock, RecordingSink
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import Fault, FaultFilesystem

__all__ = ["CrashFilesystem", "Disk", "DurabilityModel", "Fault", "FaultFilesystem", "ManualClock", "RecordingSink"]
