"""`dino-train evaluate <protocol>`: the list of protocols."""

from typing import Annotated

import tyro

from dino_train.evaluate.attention import Attention
from dino_train.evaluate.baselines import Baselines
from dino_train.evaluate.copy_detection import CopyDetection
from dino_train.evaluate.finetune import Finetune
from dino_train.evaluate.knn import Knn
from dino_train.evaluate.linear import Linear
from dino_train.evaluate.report import Report
from dino_train.evaluate.retrieval import Retrieval
from dino_train.evaluate.video_segmentation import VideoSegmentation

Evaluate = Annotated[
    Annotated[Knn, tyro.conf.subcommand("knn")]
    | Annotated[Linear, tyro.conf.subcommand("linear")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[CopyDetection, tyro.conf.subcommand("copy-detection")]
    | Annotated[VideoSegmentation, tyro.conf.subcommand("video-segmentation")]
    | Annotated[Attention, tyro.conf.subcommand("attention")]
    | Annotated[Baselines, tyro.conf.subcommand("baselines")]
    | Annotated[Report, tyro.conf.subcommand("report")],
    tyro.conf.subcommand("evaluate", description="How good a trained backbone is, by one of several protocols."),
]
