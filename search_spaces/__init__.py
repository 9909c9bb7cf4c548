"""Declarative search spaces and matrices: the YAML files of this folder, or anyone's; `default.yaml` begins with the
syntax of the one, `comprehensive.yaml` with that of the other."""

from .loader import load_space
from .matrix_space import MEASURES, Cell, Matrix, is_matrix, load_matrix
from .reader import SHIPPED, SpaceError
from .space import SearchSpace, Value

__all__ = [
    "MEASURES",
    "SHIPPED",
    "Cell",
    "Matrix",
    "SearchSpace",
    "SpaceError",
    "Value",
    "is_matrix",
    "load_matrix",
    "load_space",
]
