"""Data: readers of the published sets, protocols, clips, packing, and generated faces."""

from __future__ import annotations

from aufast.data.affwild2 import read_affwild2
from aufast.data.bp4d import read_bp4d
from aufast.data.check import Report, check_dataset, detect_dataset, read_dataset
from aufast.data.clips import AAR_CROPPING, MARGL_CROPPING, Cropping
from aufast.data.datasets import ClipDataset, FrameDataset
from aufast.data.disfa import read_disfa
from aufast.data.frames import iterate_frames
from aufast.data.generic import read_table
from aufast.data.packed import PackedDataset, PackedVideo, gather_labels
from aufast.data.prepare import Summary, prepare_dataset
from aufast.data.protocols import FOLDS, check_disjoint, fold, official_split, subject_parts
from aufast.data.records import Video
from aufast.data.synthetic import Recipe, synthesize

__all__ = [
    "AAR_CROPPING",
    "FOLDS",
    "MARGL_CROPPING",
    "ClipDataset",
    "Cropping",
    "FrameDataset",
    "PackedDataset",
    "PackedVideo",
    "Recipe",
    "Report",
    "Summary",
    "Video",
    "check_dataset",
    "check_disjoint",
    "detect_dataset",
    "fold",
    "gather_labels",
    "iterate_frames",
    "official_split",
    "prepare_dataset",
    "read_affwild2",
    "read_bp4d",
    "read_dataset",
    "read_disfa",
    "read_table",
    "subject_parts",
    "synthesize",
]
