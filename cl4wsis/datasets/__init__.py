"""Images and what is known about them: COCO, PASCAL VOC and SBD folders, image tags, drawn shapes, and their checks.

A later step sees tags alone: nothing here opens masks unless masks are asked for.

Masks. Where they overlap, the smaller one lies in front, so that a tie is not lost in the person who wears it. An
object of a single pixel is an object; an image is trained on with masks if at least one of its boxes is longer than
1 px on both sides. Crowd regions (``iscrowd``) stand for no countable object: they are neither instances nor tags.
Their pixels, and VOC's void pixels, are left out of the supervised loss where nothing else covers them, and are
background in evaluation. Images without objects belong to no step; in evaluation they are kept.

A file name is relative to the folder ``images`` of its source. A name that begins with the name of that folder
(``train/a.jpg`` with ``images/train``) is found as well.
"""

from cl4wsis.datasets.checks import DataReport, Finding, StepSummary, check_plan, check_sources
from cl4wsis.datasets.coco import AnnotatedImage, read_instances
from cl4wsis.datasets.indexed import VOC_CLASSES
from cl4wsis.datasets.pictures import (
    VOID_ID,
    EvaluationSample,
    EvaluationSet,
    MaskedPicture,
    Picture,
    TaggedImage,
)
from cl4wsis.datasets.plans import load_evaluation_set, load_masked_pictures, load_tagged_pictures
from cl4wsis.datasets.tags import read_tags
from cl4wsis.datasets.views import PhaseName, StepView, build_step_view

__all__ = [
    "VOC_CLASSES",
    "VOID_ID",
    "AnnotatedImage",
    "DataReport",
    "EvaluationSample",
    "EvaluationSet",
    "Finding",
    "MaskedPicture",
    "PhaseName",
    "Picture",
    "StepSummary",
    "StepView",
    "TaggedImage",
    "build_step_view",
    "check_plan",
    "check_sources",
    "load_evaluation_set",
    "load_masked_pictures",
    "load_tagged_pictures",
    "read_instances",
    "read_tags",
]
