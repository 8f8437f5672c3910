"""The names under which transformers finds a VL-JEPA: those of the Auto classes, and `pipeline("vl-jepa")`.

transformers keeps tables of names, and imports a class when somebody asks for it. Our names are added to these tables
as soon as transformers has made them; nothing of ours, and nothing of torch, is imported for that.
`AutoConfig.register` would need the classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

MODEL_TYPE = "vl_jepa"
TASK = "vl-jepa"
PIPELINE = "llm_jepa.vl.inference.VLJEPAPipeline"
HOME = __name__.rpartition(".")[0]  # has the classes


def register() -> None:
    """Add the names, now or when transformers is imported. Without Pillow (the extra `vl`), there is no processor."""
    call_after({"transformers.models.auto.configuration_auto": _add_config})
    call_after({"transformers.models.auto.modeling_auto": _add_model})
    if find_spec("PIL") is not None:
        call_after({"transformers.models.auto.processing_auto": _add_processor})
        call_after({"transformers.pipelines": _add_pipeline})


def _add_config(auto: ModuleType) -> None:
    sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules[HOME]  # where transformers looks for its classes
    auto.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "VLJEPAConfig"


def _add_model(auto: ModuleType) -> None:
    auto.MODEL_MAPPING_NAMES[MODEL_TYPE] = "VLJEPAModel"
    auto.MODEL_MAPPING._reverse_config_mapping["VLJEPAConfig"] = MODEL_TYPE


def _add_processor(auto: ModuleType) -> None:
    auto.PROCESSOR_MAPPING_NAMES[MODEL_TYPE] = "VLJEPAProcessor"
    auto.PROCESSOR_MAPPING._reverse_config_mapping["VLJEPAConfig"] = MODEL_TYPE


def _add_pipeline(pipelines: ModuleType) -> None:
    implementation: object = PIPELINE
    if not hasattr(pipelines, "_resolve_impl"):  # before transformers 5.24
        from .inference import VLJEPAPipeline as implementation
    pipelines.PIPELINE_REGISTRY.supported_tasks[TASK] = {
        "impl": implementation, "pt": (pipelines.AutoModel,), "type": "multimodal",
    }  # fmt: skip


def call_after(followers: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """Call each function with the module of another package, its key, as soon as that is imported: now, or later.

    So something of ours can be made known to another package without importing it: nobody can ask for it before.
    """
    later = {}
    for leader, follow in followers.items():
        if leader in sys.modules:
            follow(sys.modules[leader])
        else:
            later[leader] = follow
    if later:
        sys.meta_path.insert(0, _Followers(later))


class _Followers(MetaPathFinder):
    """Leaves the search to the other finders, and adds a call to what the loader does."""

    def __init__(self, followers: dict[str, Callable[[ModuleType], None]]) -> None:
        self.followers = followers

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        follow = self.followers.pop(name, None)  # taken out before the search below, which comes here again
        if follow is None:
            return None
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_follow(module: ModuleType) -> None:
            execute(module)
            follow(module)

        spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec
