"""Declarative search spaces: the YAML files of this folder, or anyone's; `default.yaml` begins with the syntax."""

from .loader import SHIPPED, SpaceError, load_space
from .space import OBJECTIVES, Constraint, SearchSpace, Value

__all__ = ["OBJECTIVES", "SHIPPED", "Constraint", "SearchSpace", "SpaceError", "Value", "load_space"]
