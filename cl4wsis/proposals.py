"""Class-agnostic mask proposals: what some other model took for an object, one JSON file per image.

A file is a list of ``{"segmentation": ..., "score": ...}`` with masks in any COCO form (compressed RLE, as promptable
segmenters write it, uncompressed RLE, or polygons), in pixels of the upright image. Further fields are ignored; where
``score`` is missing, ``predicted_iou`` stands in. The file of ``train/a.jpg`` is ``train/a.json`` below the folder of
proposals, or ``a.json`` there. An image in which nothing was proposed has a file with an empty list.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError

from cl4wsis.errors import DataError
from cl4wsis.masks import rle_from_segmentation


class _Proposal(BaseModel):
    segmentation: Any
    score: float = Field(validation_alias=AliasChoices("score", "predicted_iou"), allow_inf_nan=False)


_PROPOSALS = TypeAdapter(list[_Proposal])


@dataclass(frozen=True, eq=False)
class Proposals:
    """The proposals of one image, which may overlap.

    Attributes:
        height: of the image, px.
        width: of the image, px.
        rles: (N,) COCO compressed RLE.
        scores: (N,) float32.
    """

    height: int
    width: int
    rles: Sequence[dict[str, Any]]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rles)

    def id_map(self) -> NDArray[np.int32]:
        """Draw the proposals into one map: (H, W) int32, 0 none, ``i + 1`` the i-th proposal.

        Where proposals overlap, the smaller one lies in front; of equal ones, that of higher score, then the first.
        """
        ids = np.zeros((self.height, self.width), np.int32)
        if not self.rles:
            return ids
        rles = list(self.rles)
        areas = coco_mask.area(rles).tolist()
        boxes = coco_mask.toBbox(rles).astype(int).tolist()
        for index in sorted(range(len(rles)), key=lambda row: (-areas[row], self.scores[row], -row)):
            left, top, width, height = boxes[index]
            box = slice(top, top + height), slice(left, left + width)
            ids[box][coco_mask.decode(rles[index])[box] > 0] = index + 1
        return ids


def proposal_file(folder: Path, name: str) -> Path:
    """Return the file that holds the proposals of an image.

    Args:
        folder: of the proposals.
        name: of the image, relative to the folder of its source.
    """
    relative = PurePosixPath(name)
    relative = relative.with_suffix(".json") if relative.suffix else relative.with_name(f"{relative.name}.json")
    path = folder / relative
    return folder / relative.name if not path.exists() and (folder / relative.name).exists() else path


def read_proposals(folder: Path, name: str, height: int, width: int) -> Proposals:
    """Read the proposals of an image.

    Args:
        folder: of the proposals.
        name: of the image, relative to the folder of its source.
        height: of the image, px.
        width: of the image, px.

    Raises:
        DataError: the file is missing or of another form, or a mask cannot be decoded or has another size.
    """
    path = proposal_file(folder, name)
    try:
        found = _PROPOSALS.validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; an image without proposals needs a file with []"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        expected = 'expected a list of {"segmentation": ..., "score": ...}'
        raise DataError(f"{path}: {where}{': ' if where else ''}{first['msg']}; {expected}") from error
    rles = []
    for index, proposal in enumerate(found):
        try:
            rles.append(rle_from_segmentation(proposal.segmentation, height, width))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: proposal {index}: {error}") from error
    return Proposals(height, width, rles, np.array([proposal.score for proposal in found], dtype=np.float32))
