"""`dino-train evaluate <protocol>`: the list of protocols."""

from typing import Annotated

import tyro

from dino_train.evaluate.attention import Attention
from dino_train.evaluate.knn import Knn
from dino_train.evaluate.report import Report
from dino_train.evaluate.video_segmentation import VideoSegmentation

Evaluate = Annotated[
    Annotated[Knn, tyro.conf.subcommand("knn")]
    | Annotated[Attention, tyro.conf.subcommand("attention")]
    | Annotated[VideoSegmentation, tyro.conf.subcommand("video-segmentation")]
    | Annotated[Report, tyro.conf.subcommand("report")],
    tyro.conf.subcommand("evaluate", description="How good a trained backbone is, by one of several protocols."),
]
