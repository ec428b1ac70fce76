"""The graphs of a bundle: for each precision one with the grouping inside and one without.

A graph of lower precision is made from the float32 graph: its network is cut out, converted, and joined to the very
same grouping.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cl4wsis.bundle import (
    MODEL_FILE,
    NETWORK_FILE,
    PRECISION_OPTIONS,
    Manifest,
    Precision,
    VariantInfo,
    metadata_from_manifest,
)
from cl4wsis.checks import Agreement
from cl4wsis_export.borders import grouping_tail, join, network_graph, share_weights
from cl4wsis_export.graph import serialize
from cl4wsis_export.passes import MetadataPass
from cl4wsis_export.precision import HalfPass, check_half_range, count_types
from cl4wsis_export.quantize import frame_hashes, quantize_network


@dataclass(frozen=True)
class GraphPair:
    """Both graphs of one precision, ready to be written.

    Attributes:
        graph: images to instances.
        graph_content: its file.
        host: images to maps.
        host_content: its file, which needs the other one beside it.
    """

    graph: VariantInfo
    graph_content: bytes
    host: VariantInfo
    host_content: bytes

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield names and contents of both files."""
        yield self.graph.file, self.graph_content
        yield self.host.file, self.host_content

    def with_agreement(self, agreement: Agreement) -> "GraphPair":
        """Return the pair with what its verification found."""
        known = {"agreement": agreement}
        return replace(self, graph=self.graph.model_copy(update=known), host=self.host.model_copy(update=known))


def float_pair(model: ir.Model, manifest: Manifest) -> GraphPair:
    """Prepare ``model.onnx`` and ``network.onnx``.

    Args:
        model: as built by :func:`cl4wsis_export.graph.build_graph`; its metadata is replaced.
        manifest: for the metadata.
    """
    content = serialize(MetadataPass(metadata_from_manifest(manifest))(model).model)
    network = network_graph(model)
    graph = VariantInfo(
        file=MODEL_FILE,
        precision="float32",
        post="graph",
        source_sha256=sha256(content).hexdigest(),
        types=count_types(model),
    )
    return _with_host(network, graph, content, manifest)


def lower_pair(
    model: ir.Model,
    manifest: Manifest,
    precision: Precision,
    truth: VariantInfo,
    frames: NDArray[np.uint8],
) -> GraphPair:
    """Prepare both graphs of a lower precision.

    Args:
        model: the float32 graph; it stays as it is.
        manifest: for the metadata.
        precision: ``float16`` or ``int8``.
        truth: ``model.onnx``.
        frames: (N, H, W, 3) uint8 RGB on which the range of half precision must suffice, or the ranges of int8 are
            measured.

    Raises:
        BundleError: the network leaves the range of half precision, or could not be quantised.
    """
    network = network_graph(model)
    hashes: tuple[str, ...] = ()
    if precision == "float16":
        check_half_range(network, frames)
        HalfPass()(network)
    else:
        hashes = frame_hashes(frames)
        network = quantize_network(network, frames)
    whole = join(network, grouping_tail(model))
    graph = VariantInfo(
        file=_file(MODEL_FILE, precision),
        precision=precision,
        post="graph",
        source_sha256=truth.source_sha256,
        calibration=hashes,
        types=count_types(whole),
    )
    content = serialize(MetadataPass(metadata_from_manifest(manifest, graph))(whole).model)
    return _with_host(network, graph, content, manifest)


def _with_host(network: ir.Model, graph: VariantInfo, content: bytes, manifest: Manifest) -> GraphPair:
    changes = {
        "file": _file(NETWORK_FILE, graph.precision),
        "post": "host",
        "weights_file": graph.file,
        "weights_sha256": sha256(content).hexdigest(),
        "types": count_types(network),
    }
    host = graph.model_copy(update=changes)
    MetadataPass(metadata_from_manifest(manifest, host))(network)
    return GraphPair(graph, content, host, serialize(share_weights(network, content, graph.file)))


def _file(name: str, precision: Precision) -> str:
    return name if precision == "float32" else name.replace(".onnx", f"-{PRECISION_OPTIONS[precision]}.onnx")
