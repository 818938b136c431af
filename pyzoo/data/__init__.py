"""Data: real and small, made on the spot, or in folders that you have."""

from pyzoo.data._common import detection_collate
from pyzoo.data.coco import CocoDetection
from pyzoo.data.digits import DigitScenes, digits
from pyzoo.data.folder import image_folder
from pyzoo.data.picture import read_picture, write_picture
from pyzoo.data.small import cifar10, mnist
from pyzoo.data.voc import VocDetection

__all__ = [
    "CocoDetection",
    "DigitScenes",
    "VocDetection",
    "cifar10",
    "detection_collate",
    "digits",
    "image_folder",
    "mnist",
    "read_picture",
    "write_picture",
]
