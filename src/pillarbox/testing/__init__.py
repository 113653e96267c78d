"""For the tests of applications and of Pillarbox itself.

doubles.py   a clock that is set by hand, a sink that answers as it is told
crash.py     a disk in memory, and processes that use it
survivors.py what may be left of such a disk when the power fails
fault.py     a file system that fails where it is told to
"""

from pillarbox.testing.crash import CrashFilesystem, Disk
from pillarbox.testing.doubles import ManualClock, RecordingSink
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import Fault, FaultFilesystem

__all__ = ["CrashFilesystem", "Disk", "DurabilityModel", "Fault", "FaultFilesystem", "ManualClock", "RecordingSink"]
