"""Budgets and requests in, step plans out. No torch."""

from opsin.scheduler.limits import SchedulerLimits
from opsin.scheduler.scheduler import Scheduler

__all__ = ["Scheduler", "SchedulerLimits"]
