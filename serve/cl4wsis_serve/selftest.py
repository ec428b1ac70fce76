"""The self-test: golden inputs of a bundle through the backend that was chosen, against the outputs stored for them.

It tells whether driver, runtime and graph work together on this machine, before the first answer is relied on.
"""

import zipfile
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cl4wsis.agreement import AgreementCounter
from cl4wsis.bundle import Bundle
from cl4wsis.checks import Agreement
from cl4wsis.errors import BackendError, BundleError
from cl4wsis.images import read_image
from cl4wsis.instances import Instances

if TYPE_CHECKING:
    from cl4wsis_serve.predictor import Predictor


def run_self_test(predictor: "Predictor", bundle: Bundle) -> None:
    """Compare the answers to a bundle's golden inputs with those stored in it.

    Args:
        predictor: the model as it was opened.
        bundle: where it comes from.

    Raises:
        BackendError: the answers are further away than the precision explains, or the bundle has no golden inputs.
        BundleError: a golden input or output cannot be read.
    """
    result = golden_agreement(predictor, bundle)
    precision = predictor.precision
    where = f"{bundle.path}: self-test of {precision} on {predictor.backend.name}"
    if result is None:
        raise BackendError(
            f"{where}: there are no golden inputs to test with; open a bundle folder written by 'cl4wsis export', "
            "or leave the self-test out"
        )
    limit = bundle.manifest.limits_of(precision).golden_pixels
    if limit is not None and result.differing_pixels > limit:
        raise BackendError(
            f"{where}: {result.differing_pixels:.1%} of the foreground of {result.images} golden images differ from "
            f"what was stored (limit {limit:.1%}); choose another backend or precision, update the runtime and "
            "its driver, or export the step again"
        )


def golden_agreement(predictor: "Predictor", bundle: Bundle) -> Agreement | None:
    """Compare answers with the golden outputs of a bundle; nothing if it has none.

    Raises:
        BundleError: a golden input or output cannot be read.
        BackendError: the runtime failed.
    """
    counter = AgreementCounter()
    for frame, expected in golden_cases(bundle):
        counter.add(predictor.predict(frame), expected)
    result = counter.result()
    return result if result.images else None


def golden_cases(bundle: Bundle) -> Iterator[tuple[NDArray[np.uint8], Instances]]:
    """Read the golden inputs, (H, W, 3) uint8 RGB of the network's size, with the answers stored for them.

    Raises:
        BundleError: a file cannot be understood, or is of another size than the network's input.
    """
    for case in bundle.manifest.golden:
        frame = read_image(bundle.path / case.image)
        try:
            with (bundle.path / case.outputs).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                slots = Instances.from_slots(arrays)
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise BundleError(
                f"{bundle.path / case.outputs}: is no golden output ({error}); export the step again"
            ) from error
        size = bundle.manifest.input.size
        if frame.shape[:2] != size or slots.instance_ids.shape != size:
            raise BundleError(
                f"{bundle.path / case.image}: a golden input and its output must be of the network's size {size} "
                f"(height, width), found {frame.shape[:2]} and {slots.instance_ids.shape}; export the step again"
            )
        yield frame, slots.select(slots.areas > 0)
