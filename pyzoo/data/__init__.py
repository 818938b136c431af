"""Data: real and small, made on the spot, or in folders that you have."""

from pyzoo.data._common import detection_collate
from pyzoo.data.coco import CocoDetection
from pyzoo.data.digits import DigitScenes, digits
from pyzoo.data.folder import image_folder
from pyzoo.data.picture import read_picture, write_picture
from pyzoo.data.voc import VocDetection

__all__ = [
    "CocoDetection",
    "DigitScenes",
    "VocDetection",
    "detection_collate",
    "digits",
    "image_folder",
    "read_picture",
    "write_picture",
]
