"""The datasets by the names that prep/convert.py takes."""

from prep.datasets import Dataset
from prep.datasets.autoflow import AUTOFLOW
from prep.datasets.chairssdhom import CHAIRSSDHOM
from prep.datasets.flyingchairs import FLYINGCHAIRS
from prep.datasets.flyingchairs2 import FLYINGCHAIRS2
from prep.datasets.flyingchairsocc import FLYINGCHAIRSOCC
from prep.datasets.flyingthings3d import FLYINGTHINGS3D
from prep.datasets.flyingthings3d_subset import FLYINGTHINGS3D_SUBSET
from prep.datasets.hd1k import HD1K
from prep.datasets.kitti import KITTI2012, KITTI2015
from prep.datasets.kubric import KUBRIC, KUBRIC_SWAPPED
from prep.datasets.middlebury import MIDDLEBURY
from prep.datasets.sceneflow import DRIVING, MONKAA
from prep.datasets.sintel import SINTEL
from prep.datasets.spring import SPRING
from prep.datasets.tartanair import TARTANAIR
from prep.datasets.viper import VIPER

DATASETS: dict[str, Dataset] = {
    "autoflow": AUTOFLOW,
    "chairssdhom": CHAIRSSDHOM,
    "driving": DRIVING,
    "flyingchairs": FLYINGCHAIRS,
    "flyingchairs2": FLYINGCHAIRS2,
    "flyingchairsocc": FLYINGCHAIRSOCC,
    "flyingthings3d": FLYINGTHINGS3D,
    "flyingthings3d-subset": FLYINGTHINGS3D_SUBSET,
    "hd1k": HD1K,
    "kitti2012": KITTI2012,
    "kitti2015": KITTI2015,
    "kubric": KUBRIC,
    "kubric-swapped": KUBRIC_SWAPPED,
    "middlebury": MIDDLEBURY,
    "monkaa": MONKAA,
    "sintel": SINTEL,
    "spring": SPRING,
    "tartanair": TARTANAIR,
    "viper": VIPER,
}
