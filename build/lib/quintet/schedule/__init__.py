"""The order of pipeline work, as data: one truth for the runtime, the simulator, the checker and the drawings."""

from quintet.schedule.build import NAMES as NAMES
from quintet.schedule.build import build as build
from quintet.schedule.build import fewest_microbatches as fewest_microbatches
from quintet.schedule.check import check as check
from quintet.schedule.lower import add_transfers as add_transfers
from quintet.schedule.lower import forward_only as forward_only
from quintet.schedule.op import Op as Op
from quintet.schedule.op import Pair as Pair
from quintet.schedule.table import Schedule as Schedule
