"""`slicer.parameterNodeWrapper`: typed access to a vtkMRMLScriptedModuleNode, and its binding to widgets.

Written from the developer guide ("Parameter nodes"). Left out: `createGui`, custom serializers and connectors, and
`typing.Any`.
"""

from .annotations import (
    Choice,
    Decimals,
    Default,
    Exclude,
    IsInstance,
    Maximum,
    Minimum,
    NotNone,
    RangeBounds,
    SingleStep,
    Validator,
    WithinRange,
)
from .connectors import GuiConnector
from .packs import FloatRange, isParameterPack, parameterPack
from .storage import ObservedDict, ObservedList
from .wrapper import (
    SlicerParameterNamePropertyName,
    findChildWidgetForParameter,
    isParameterNodeWrapper,
    parameterNodeWrapper,
)

__all__ = [
    "Choice",
    "Decimals",
    "Default",
    "Exclude",
    "FloatRange",
    "GuiConnector",
    "IsInstance",
    "Maximum",
    "Minimum",
    "NotNone",
    "ObservedDict",
    "ObservedList",
    "RangeBounds",
    "SingleStep",
    "SlicerParameterNamePropertyName",
    "Validator",
    "WithinRange",
    "findChildWidgetForParameter",
    "isParameterNodeWrapper",
    "isParameterPack",
    "parameterNodeWrapper",
    "parameterPack",
]
