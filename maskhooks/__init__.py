"""Hook any PyTorch model and learn which inputs, hidden states or graph edges its predictions need."""

from maskhooks.checks.doctor import doctor
from maskhooks.comparison.compare import compare
from maskhooks.comparison.comparison import Comparison
from maskhooks.explainers.attention import Attention
from maskhooks.explainers.beam import Beam
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.explainers.erasure import Erasure
from maskhooks.explainers.graphmask import GraphMask
from maskhooks.explainers.guan import Guan
from maskhooks.explainers.iba import IBA
from maskhooks.explainers.leave_one_out import LeaveOneOut
from maskhooks.explainers.random import Random
from maskhooks.explainers.readout import Readout
from maskhooks.explainers.reinforce import Reinforce
from maskhooks.explainers.rollout import Rollout
from maskhooks.explainers.saving import load
from maskhooks.explainers.schulz import Schulz
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.shards import Shards
from maskhooks.model.adapter import Adapter
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Positions
from maskhooks.model.task import Task
from maskhooks.model.wrapping import wrap
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks.plugins.registry import register, unregister
from maskhooks.reports.run_page import report
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site
from maskhooks.training.recipe import Recipe

__all__ = [
    "IBA",
    "Adapter",
    "Attention",
    "Beam",
    "Comparison",
    "DiffMask",
    "Erasure",
    "Explanation",
    "GraphMask",
    "Guan",
    "Hooked",
    "LeaveOneOut",
    "Pattern",
    "Positions",
    "Random",
    "Readout",
    "Recipe",
    "Reinforce",
    "Rollout",
    "Schulz",
    "Shards",
    "Site",
    "Task",
    "compare",
    "doctor",
    "hookimpl",
    "load",
    "register",
    "report",
    "unregister",
    "wrap",
]
