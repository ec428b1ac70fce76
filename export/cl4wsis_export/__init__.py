"""Export: the Segmenter and its post-processing as one graph, verified and packed into a bundle.

from cl4wsis_export import ExportSpec, export_step
export_step(Path("runs/shapes/step-2"), Path("shapes.cl4wsis"), ExportSpec())
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl4wsis_export.pack import export_network, export_step
    from cl4wsis_export.spec import ExportSpec, spec_for_step

__all__ = ["ExportSpec", "export_network", "export_step", "spec_for_step"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that building engines needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'cl4wsis_export' has no attribute '{name}'")
    from cl4wsis_export import pack, spec

    return getattr(pack, name) if name.startswith("export_") else getattr(spec, name)
